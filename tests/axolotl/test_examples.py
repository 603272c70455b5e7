"""The one line in Axolotl's own example YAMLs, of the version that is installed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml
from axolotl_examples import Verdict, examples_of_axolotl, judge, share_accepted

DOCS = Path(__file__).parents[2] / "docs" / "axolotl.md"


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    # make fetches them; without them there is nothing to test, and that is no success.
    return judge(examples_of_axolotl())


@pytest.mark.slow
def test_97_of_100_are_accepted_and_the_documentation_has_the_figures(
    verdicts: list[Verdict],
) -> None:
    counts = Counter(verdict.kind for verdict in verdicts)
    assert counts["accepted"] > 200
    assert share_accepted(verdicts) >= 0.97
    total = counts["accepted"] + counts["refused"]
    assert f"{counts['accepted']} of {total}" in DOCS.read_text()


@pytest.mark.slow
def test_each_refusal_is_in_the_documentation_with_its_way_out(verdicts: list[Verdict]) -> None:
    refusals = [verdict for verdict in verdicts if verdict.kind == "refused"]
    assert [verdict.path.name for verdict in refusals] == ["eaft-example.yml"]
    (reason,) = refusals[0].reasons
    assert "deft_objective: eaft" in reason
    assert "use_eaft" in DOCS.read_text()


@pytest.mark.slow
def test_what_is_switched_off_are_other_cross_entropies(verdicts: list[Verdict]) -> None:
    accepted = [verdict for verdict in verdicts if verdict.kind == "accepted"]
    for verdict in accepted:
        plugins = yaml.safe_load(verdict.path.read_text()).get("plugins") or []
        lists_cut = any(name.endswith("CutCrossEntropyPlugin") for name in plugins)
        said = " ".join(verdict.reasons)
        assert ("cut_cross_entropy set to false" in said) == lists_cut, verdict.path
    assert sum("liger_fused_linear_cross_entropy set to" in " ".join(v.reasons) for v in accepted)
