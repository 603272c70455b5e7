"""Whatever is in a YAML, `deft doctor` says what is wrong with it, and does not fail itself."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deft_plugin import doctor

from .anything import changed, values

BASE_MODEL = Path(__file__).resolve().parents[2] / "assets" / "base_model"
TRL = {
    "model_name_or_path": str(BASE_MODEL),
    "dataset_name": "some/data",
    "loss_type": "cayley_trans",
    "loss_kwargs": {"floor_coefficient": 0.3},
    "output_dir": "unused",
}
TRL_KEYS = [
    "label_smoothing_factor",
    "use_liger_kernel",
    "lora_target_modules",
    "use_peft",
    "losstype",
]
unhurried = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


pytestmark = pytest.mark.usefixtures("trl_as_it_was")


def check(path: Path, text: str) -> list[doctor.Finding]:
    path.write_text(text)
    findings = [*doctor.check_yaml(path)]
    assert findings
    return findings


@unhurried
@given(
    text=st.one_of(st.text(), values.map(lambda value: yaml.safe_dump(value, allow_unicode=True)))
)
def test_any_text(tmp_path: Path, text: str) -> None:
    findings = check(tmp_path / "any.yaml", text)
    assert any(finding.level == "error" for finding in findings)


@pytest.mark.skipif(not find_spec("trl"), reason="trl not installed")
@unhurried
@given(configuration=changed(TRL, TRL_KEYS))
def test_changed_yaml_of_trl(tmp_path: Path, configuration: dict[str, Any]) -> None:
    check(tmp_path / "trl.yaml", yaml.safe_dump(configuration))
