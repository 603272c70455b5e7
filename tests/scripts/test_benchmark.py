"""The benchmark measures what its tables say: masked labels, ratios, the memory's bound, and who is missing and why."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

pytest.importorskip("typer", reason="needs the extra `scripts`")

import benchmark
import benchmark_measure
import benchmark_tables
import profile_call
from benchmark_job import GPU_SHAPES, IGNORED, Job, make_inputs, parse_shape, sizes_and_masks
from benchmark_measure import evaluate, gradient_error, gradients
from benchmark_tables import memory_bound_mib, ratios
from contestant import Contestant, Machine
from contestants import CONTESTANTS, FORMULA, OUR_NLL, OURS, PRODUCTS, formula
from public_losses import PUBLIC_LOSSES

from deft_plugin import linear_gated_loss


def job(**changes: Any) -> Job:
    sizes = {"tokens": 96, "vocab": 131, "hidden": 16, "frozen": False, "dtype": "float32"}
    return Job(**{**sizes, "inputs": "trained", "device": "cpu", "repetitions": 1, **changes})


def seconds(**times: float) -> dict[str, dict[str, Any]]:
    return {
        name: {"seconds": time, "evaluation_seconds": time, "extra_mib": 10 * time, "error": 0.0}
        for name, time in times.items()
    }


def test_a_share_of_the_labels_is_masked_and_nothing_else_changes() -> None:
    whole, half = (make_inputs(job(masked=share), 96, 3) for share in (0.0, 0.5))
    masked = half[2] == IGNORED
    assert masked.sum() == 48 == job(masked=0.5).masked_tokens
    assert not (whole[2] == IGNORED).any()
    assert whole[0].equal(half[0])
    assert whole[1].equal(half[1])
    assert whole[2][~masked].equal(half[2][~masked])
    assert "50% of the labels masked" in job(masked=0.5).title
    assert "masked" not in job().title


@pytest.mark.parametrize("objective", ["nll", "deft", "dft", "cayley_trans"])
def test_masked_labels_leave_the_formulas_mean(objective: str) -> None:
    hidden, weight, targets = make_inputs(job(masked=0.5), 96, 3)
    kept = targets != IGNORED
    loss = formula(objective)
    whole = gradients(loss, hidden.double(), weight.double(), targets, False)
    alone = gradients(loss, hidden[kept].double(), weight.double(), targets[kept], False)
    torch.testing.assert_close(whole[0][kept], alone[0])
    torch.testing.assert_close(whole[1], alone[1])
    assert not whole[0][~kept].any()
    assert loss(hidden, weight, targets).item() == pytest.approx(
        linear_gated_loss(hidden, weight, targets, objective).loss.item(), rel=1e-5
    )


@pytest.mark.parametrize("masked", [0.0, 0.5])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name.startswith("deft_plugin")])
def test_our_error_is_small_and_a_wrong_gradient_is_not(
    name: str, frozen: bool, masked: float
) -> None:
    contestant = CONTESTANTS[name]
    loss = contestant.build()
    measured = job(frozen=frozen, masked=masked)
    if obstacle := contestant.needs.unmet(Machine.here("cpu"), measured):
        pytest.skip(obstacle)
    # What skipping loses is a choice, and is said.
    limit = 8e-3 if "skipping" in name else 1e-3
    assert gradient_error(loss, contestant.objective, measured) < limit
    other = "nll" if contestant.objective != "nll" else "dft"
    assert gradient_error(loss, other, measured) > 1e-2


def products(name: str, measured: Job, train: bool) -> float:
    """Of N by V by H, in one forward and backward or one evaluation."""
    loss = CONTESTANTS[name].build()
    inputs = make_inputs(measured, measured.tokens, 0)
    with FlopCounterMode(display=False) as counter:
        (gradients if train else evaluate)(loss, *inputs, measured.frozen)
    one = 2 * measured.tokens * measured.vocab * measured.hidden
    return counter.get_total_flops() / one


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "name", [FORMULA, OURS, OUR_NLL, PRODUCTS, "torch cross_entropy", "Liger FLCE, Triton"]
)
def test_evaluation_is_one_product(name: str, frozen: bool) -> None:
    if name in PUBLIC_LOSSES:
        for module in PUBLIC_LOSSES[name].needs.modules:
            pytest.importorskip(module)
    measured = job(vocab=192, frozen=frozen)
    assert products(name, measured, train=False) == 1
    if frozen or not name.startswith("deft_plugin"):  # The counter does not know addmm_.
        assert products(name, measured, train=True) == (2 if frozen else 3)


def test_the_products_alone_are_those_that_a_loss_cannot_avoid() -> None:
    # Of the labels that count, and of the largest vocabulary that is a multiple of 64.
    assert products(PRODUCTS, job(vocab=192, masked=0.5), train=True) == 1.5
    assert products(PRODUCTS, job(vocab=192 + 1), train=True) == pytest.approx(3 * 192 / 193)
    assert products(OURS, job(vocab=192, masked=0.5, frozen=True), train=True) == 1
    # Others compute every row.
    assert products("torch cross_entropy", job(vocab=192, masked=0.5), train=True) == 3


def test_ratios_are_to_our_nll_the_fastest_peer_and_the_products() -> None:
    results = seconds(
        **{FORMULA: 8, OURS: 4, OUR_NLL: 5, "TRL fused LM head": 3, "torch cross_entropy": 2},
        **{"Liger FLCE, token scaling": 1, PRODUCTS: 0.5},
    )
    results["QuACK chunked"] = {"absent": "it needs a GPU"}
    found = ratios(results)
    # Token scaling is another objective, so that it is no peer of nll's.
    assert benchmark_tables.fastest_peer(results) == "torch cross_entropy"
    assert found[OURS] == {
        "of_formula": 0.5,
        "of_our_nll": 0.8,
        "of_fastest_peer": 2,
        "products_share": 0.125,
    }
    assert "QuACK chunked" not in found
    assert ratios(seconds(**{OURS: 4})) == {OURS: {}}


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        # docs/gpu.md: 3,166 and 315 MiB were measured; a buffer of 1 GiB, the gradients, and 100 MiB.
        ({}, (3166, 1024 + 64 + 2004 + 100)),
        ({"frozen": True}, (315, 1024 + 64 + 100)),
        ({"frozen": True, "tokens": 65536}, (256 + 512, 1024 + 512 + 100)),
    ],
)
def test_the_memorys_bound_is_a_tile_and_the_gradients(
    changes: dict[str, Any], most: tuple[int, int]
) -> None:
    sizes = {"tokens": 8192, "vocab": 128256, "hidden": 4096, "dtype": "bfloat16"}
    measured, bound = most
    assert measured <= memory_bound_mib(job(**{**sizes, "device": "cuda", **changes})) <= bound


def test_a_gpus_own_shapes_are_measured_with_masked_labels_and_an_odd_vocabulary() -> None:
    found = sizes_and_masks("cuda", None, None)
    assert [size for size, masked in found if not masked] == [*map(parse_shape, GPU_SHAPES)]
    assert (8192, 128257, 4096) in [size for size, masked in found]
    halved = {size for size, masked in found if masked == 0.5}
    assert {(8192, 128256, 4096), (65536, 128256, 4096)} <= halved
    assert sizes_and_masks("cuda", None, 0.25) == [(s, 0.25) for s, m in found if not m]
    assert sizes_and_masks("cuda", ["8,9,4"], None) == [((8, 9, 4), 0.0)]
    assert [masked for _, masked in sizes_and_masks("cpu", None, None)] == [0.0]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `scripts`")
    results = {
        job(frozen=frozen, masked=0.5): {
            **seconds(**{FORMULA: 8, OURS: 4, OUR_NLL: 5, "TRL fused LM head": 3, PRODUCTS: 2}),
            "QuACK chunked": {"absent": "it needs a GPU"},
        }
        for frozen in (False, True)
    }
    results[job()] = {OURS: {"absent": "out of memory"}}
    benchmark_tables.write_files(results, tmp_path)
    assert benchmark_tables.read_results([tmp_path / "benchmark.csv"]) == results
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    with (tmp_path / "benchmark.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["contestant"] == OURS)
    assert float(row["of_fastest_peer"]) == pytest.approx(4 / 3)
    assert float(row["products_share"]) == 0.5
    # 3 products of 2 N V H, of the half that counts.
    assert float(row["teraflops"]) == pytest.approx(3 * 2 * 48 * 131 * 16 / 4 / 1e12)
    summary = CliRunner().invoke(benchmark.app, ["summary", str(tmp_path / "benchmark.csv")])
    assert summary.exit_code == 0
    for said in ("0.800", "1.33 (TRL", "50%", "out of memory"):
        assert said in summary.output


def test_who_does_not_run_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*arguments: Any) -> Any:
        raise RuntimeError("no kernel image\nfor this card")

    monkeypatch.setitem(CONTESTANTS, "fails", Contestant("nll", lambda: absent))
    monkeypatch.setitem(CONTESTANTS, "fails to build", Contestant("nll", absent))
    for name in ("fails", "fails to build"):
        benchmark_measure.work(name, [job(), job(frozen=True)])
        for line in capsys.readouterr().out.splitlines():
            assert json.loads(line) == {"absent": "RuntimeError: no kernel image"}
    # Without a process for who cannot run anyway.
    monkeypatch.setattr(benchmark, "run_worker", absent)
    results = benchmark.run_workers(["QuACK scaled exp"], [job(), job(frozen=True)])
    assert all("QuACK scaled exp" in found for found in results.values())
    assert all("absent" in found["QuACK scaled exp"] for found in results.values())
    lines = benchmark_tables.remarks(
        {
            "a": {"absent": "it needs a GPU"},
            "b": {"seconds": 1, "remark": "in chunks"},
            "c": {"absent": "it needs a GPU"},
        }
    )
    assert lines == ["b: in chunks", "not measured, since it needs a GPU: a; c"]


def test_a_contestant_that_hangs_is_stopped() -> None:
    results = benchmark.run_worker(OURS, [job(), job(frozen=True)], limit_seconds=0.2)
    assert results == [{"absent": "it was stopped after 0 s"}] * 2


@pytest.mark.slow
def test_the_command_measures_and_compares(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `scripts`")
    names = [FORMULA, OURS, OUR_NLL, "torch cross_entropy", "QuACK chunked", PRODUCTS]
    arguments = ["loss", "--device", "cpu", "--shape", "64,131,16", "--masked", "0.5"]
    arguments += ["--repetitions", "1", "--output", str(tmp_path)]
    for name in names:
        arguments += ["--only", name]
    result = CliRunner().invoke(benchmark.app, arguments)
    assert result.exit_code == 0, result.output
    assert "not measured, since" in result.output
    results = benchmark_tables.read_results([tmp_path / "benchmark.csv"])
    assert [measured.frozen for measured in results] == [False, True]
    for contestants in results.values():
        assert list(contestants) == names
        assert contestants[OURS]["error"] < 1e-5
        assert set(ratios(contestants)[OURS]) == {
            *("of_formula", "of_our_nll", "of_fastest_peer", "products_share")
        }


@pytest.mark.parametrize(
    "arguments",
    [
        ["--masked", "1"],
        ["--shape", "64,131"],
        ["--only", "deft"],
        ["--dtype", "int8"],
        ["--inputs", "none"],
        ["--repetitions", "0"],
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(benchmark.app, ["loss", "--device", "cpu", *arguments])
    assert result.exit_code == 2


def test_a_profile_has_the_products_of_a_call(tmp_path: Path) -> None:
    measured = job(tokens=256, vocab=2048, hidden=64)
    rows = profile_call.profile_call(OURS, measured, tmp_path / "trace.json")
    assert [row["milliseconds"] for row in rows] == sorted(
        (row["milliseconds"] for row in rows), reverse=True
    )
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert any("mm" in row["kernel"] for row in rows[:10])
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert profile_call.kernels_table("DEFT", rows).row_count <= profile_call.ROWS + 1
    refused = CliRunner().invoke(
        profile_call.app, ["--device", "cpu", "--contestant", "QuACK chunked"]
    )
    assert refused.exit_code == 2
