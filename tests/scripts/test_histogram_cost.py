"""The measurement of what histograms cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import tiny_model

cost = pytest.importorskip("histogram_cost", reason="needs the extra `scripts`")


def test_steps_and_metrics_are_measured_with_and_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    # The histograms' part of a call is what makes the difference.
    ran: list[object] = []
    add = cost.TokenMetrics.add

    def noted(self: object, *given: object) -> None:
        ran.append(self)
        add(self, *given)

    monkeypatch.setattr(cost.TokenMetrics, "add", noted)
    cost.main(str(tmp_path), rows=2, length=8, steps=3)
    without, with_ = ran[:2]
    assert ran[2:8] == [without, with_, with_, without, without, with_]
    assert ran[8:] == [without] * cost.REPETITIONS + [with_] * cost.REPETITIONS
    output = capsys.readouterr().out
    assert [line.count(" ms") for line in output.splitlines() if "│" in line] == [3, 3]
    assert "quartiles of the steps' differences: " in output
