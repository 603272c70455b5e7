"""What the growth script counts on ranks is what its plan and the page on scaling say is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

growth = pytest.importorskip("growth", reason="needs the extra `scripts`")
benchmark = pytest.importorskip("benchmark", reason="needs the extra `scripts`")


def plan(**changes: float) -> dict[str, float]:
    sizes = {
        "parameters": 1000.0,
        "trained": 1000.0,
        "layers": 3,
        "hidden": 8,
        "vocab": 100,
        "ranks": 4,
        "tokens": 10,
        "micro_batches": 1,
    }
    return growth.Plan(**{**sizes, **changes}).sent_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_a_sharded_vocabulary_reduces_what_the_plan_says(frozen: bool) -> None:
    job = benchmark.Job(48, 101, 16, frozen, "float32", "trained", "cpu", 1)
    result = growth.run_ranks(2, job)
    assert result["reduced_bytes"] == growth.reduced_bytes(48, 16, item_size=4)
    assert result["seconds"] > 0


def test_each_rank_sends_its_share_of_a_ring() -> None:
    # Gradients once around and back; a quarter of each buffer stays.
    assert plan()["DDP, ZeRO-1"] == 2 * 1000 * 2 * 3 / 4
    # Weights for forward and backward, gradients to their owners.
    assert plan()["ZeRO-3, FSDP2"] == 3 * 1000 * 2 * 3 / 4
    # An adapter's gradients are few; its frozen base is gathered all the same.
    assert plan(trained=10)["DDP, ZeRO-1"] == 2 * 10 * 2 * 3 / 4
    assert plan(trained=10)["ZeRO-3, FSDP2"] == (2 * 1000 + 10) * 2 * 3 / 4


def test_accumulation_costs_what_is_sent_for_every_micro_batch() -> None:
    once, four = plan(), plan(micro_batches=4)
    assert four["DDP, ZeRO-1"] == once["DDP, ZeRO-1"]
    assert four["ZeRO-2"] == once["ZeRO-2"] * 5 / 2
    assert four["ZeRO-3, FSDP2"] == once["ZeRO-3, FSDP2"] * 4
    assert all(value == 0 for value in plan(ranks=1).values())


def test_the_statistics_of_a_sharded_vocabulary_do_not_grow_with_it() -> None:
    name = "tensor parallel, gated lm_head"
    assert plan()[name] == plan(vocab=100_000)[name]
    logits = "tensor parallel, gathered logits"
    assert plan(vocab=100_000)[logits] == 1000 * plan()[logits]


def test_what_is_grown_covers_both_heads_and_holds_the_rest(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `scripts`")
    for device, sizes in growth.SIZES.items():
        jobs = sizes.jobs(device, 3)
        for grown, field, other in (
            ("tokens", "tokens", "vocab"),
            ("vocabulary", "vocab", "tokens"),
        ):
            assert len({getattr(job, other) for job in jobs[grown]}) == 1
            for frozen in (False, True):
                line = [getattr(job, field) for job in jobs[grown] if job.frozen == frozen]
                assert line == sorted(set(line))
        assert all(getattr(torch, job.dtype) for job in jobs["ranks"])
    rows = [
        {"grown": g, "contestant": n, "ranks": 1, "tokens": 8, "vocab": 9, "hidden": 4, "frozen": f}
        | ({"absent": "no GPU"} if f else {"seconds": 0.1, "extra_mib": 2.0, "reduced_bytes": 5})
        for g in ("tokens", "vocabulary", "ranks")
        for n in growth.CONTESTANTS
        for f in (False, True)
    ]
    growth.plot(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000
    assert growth.growth_table(rows, "ranks", frozen=True).row_count == 2


@pytest.mark.parametrize(
    "arguments", [["--rate", "0"], ["--bandwidth", "-3"], ["--parameters", "nan"], ["--ranks", "0"]]
)
def test_a_plan_of_what_no_step_could_have_is_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(growth.app, ["plan", *arguments])
    assert result.exit_code == 2


def test_a_plan_is_printed() -> None:
    result = CliRunner().invoke(growth.app, ["plan", "--ranks", "16"])
    assert result.exit_code == 0
    assert "gated lm_head" in result.output
