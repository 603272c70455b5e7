"""The comparison of scopes that docs/scopes.md shows."""

from __future__ import annotations

import re

import pytest
from typer import Typer
from typer.testing import CliRunner

compare_scopes = pytest.importorskip("compare_scopes", reason="needs the extra `scripts`")


@pytest.mark.slow
def test_scopes_are_compared_with_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_scopes, "ROWS", 8)
    monkeypatch.setattr(compare_scopes, "SPLITS", (1, 2, 8))
    app = Typer()
    app.command()(compare_scopes.main)
    result = CliRunner().invoke(app, ["--steps", "2"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    rows = {
        line.split()[1]: [float(share) for share in re.findall(r"([\d.]+)%", line)]
        for line in result.output.splitlines()
        if line.count("%") == len(compare_scopes.SPLITS)
    }
    assert list(rows) == ["micro_batch", "global", "ema"]
    # The exact mean: no split changes the gradient. A running mean: all change it alike. A call's own mean:
    # the finer the split, the more.
    assert max(rows["global"]) < 0.1
    assert max(rows["ema"]) - min(rows["ema"]) < 0.1
    assert rows["micro_batch"][0] < 0.1
    assert rows["micro_batch"] == sorted(rows["micro_batch"])
    assert rows["micro_batch"][-1] > 20
