"""The scripts of the repository's own figures: all shapes, the summary against the aims, a profile."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark
import profile_call
import pytest
from benchmark_shapes import GPU_SHAPES, parse_shape, sizes_and_masks
from typer.testing import CliRunner

from deft_plugin.benchmark import files
from deft_plugin.benchmark.contestants import FORMULA, OUR_NLL, OURS, PRODUCTS
from deft_plugin.benchmark.tables import ratios
from tests.benchmark.cases import job, seconds


def test_a_gpus_own_shapes_are_measured_with_masked_labels_and_an_odd_vocabulary() -> None:
    found = sizes_and_masks("cuda", None, None)
    assert [size for size, masked in found if not masked] == [*map(parse_shape, GPU_SHAPES)]
    assert (8192, 128257, 4096) in [size for size, masked in found]
    halved = {size for size, masked in found if masked == 0.5}
    assert {(8192, 128256, 4096), (65536, 128256, 4096)} <= halved
    assert sizes_and_masks("cuda", None, 0.25) == [(s, 0.25) for s, m in found if not m]
    assert sizes_and_masks("cuda", ["8,9,4"], None) == [((8, 9, 4), 0.0)]
    assert [masked for _, masked in sizes_and_masks("cpu", None, None)] == [0.0]


def test_the_summary_has_a_line_for_each_job(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    results = {
        job(frozen=frozen, masked=0.5): seconds(
            **{FORMULA: 8, OURS: 4, OUR_NLL: 5, "TRL fused LM head": 3, PRODUCTS: 2}
        )
        for frozen in (False, True)
    }
    results[job()] = {OURS: {"absent": "out of memory"}}
    files.write_files(results, tmp_path)
    summary = CliRunner().invoke(benchmark.app, ["summary", str(tmp_path / "benchmark.csv")])
    assert summary.exit_code == 0
    for said in ("0.800", "1.33 (TRL", "50%", "out of memory"):
        assert said in summary.output


@pytest.mark.slow
def test_the_command_measures_and_compares(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    names = [FORMULA, OURS, OUR_NLL, "torch cross_entropy", "QuACK chunked", PRODUCTS]
    arguments = ["loss", "--device", "cpu", "--shape", "64,131,16", "--masked", "0.5"]
    arguments += ["--repetitions", "1", "--output", str(tmp_path)]
    for name in names:
        arguments += ["--only", name]
    result = CliRunner().invoke(benchmark.app, arguments)
    assert result.exit_code == 0, result.output
    assert "not measured, since" in result.output
    results = files.read_results([tmp_path / "benchmark.csv"])
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
