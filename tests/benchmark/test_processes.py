"""Who does not run is named with the reason, and who hangs is stopped."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deft_plugin.benchmark import measure, processes, tables
from deft_plugin.benchmark.contestant import Contestant
from deft_plugin.benchmark.contestants import CONTESTANTS, OURS

from .cases import job


def test_who_does_not_run_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*arguments: Any) -> Any:
        raise RuntimeError("no kernel image\nfor this card")

    monkeypatch.setitem(CONTESTANTS, "fails", Contestant("nll", lambda: absent))
    monkeypatch.setitem(CONTESTANTS, "fails to build", Contestant("nll", absent))
    for name in ("fails", "fails to build"):
        measure.work(name, [job(), job(frozen=True)])
        for line in capsys.readouterr().out.splitlines():
            assert json.loads(line) == {"absent": "RuntimeError: no kernel image"}
    # Without a process for who cannot run anyway.
    monkeypatch.setattr(processes, "run_worker", absent)
    results = processes.run_workers(["QuACK scaled exp"], [job(), job(frozen=True)])
    assert all("QuACK scaled exp" in found for found in results.values())
    assert all("absent" in found["QuACK scaled exp"] for found in results.values())
    lines = tables.remarks(
        {
            "a": {"absent": "it needs a GPU"},
            "b": {"seconds": 1, "remark": "in chunks"},
            "c": {"absent": "it needs a GPU"},
        }
    )
    assert lines == ["b: in chunks", "not measured, since it needs a GPU: a; c"]


def test_a_contestant_that_hangs_is_stopped() -> None:
    results = processes.run_worker(OURS, [job(), job(frozen=True)], limit_seconds=0.2)
    assert results == [{"absent": "it was stopped after 0 s"}] * 2
