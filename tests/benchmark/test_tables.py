"""Ratios, the memory's bound, and figures that are written and read again."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from deft_plugin.benchmark import files, tables
from deft_plugin.benchmark.contestants import FORMULA, OUR_NLL, OURS, PRODUCTS
from deft_plugin.benchmark.tables import memory_bound_mib, ratios, results_table

from .cases import job, seconds


def test_ratios_are_to_our_nll_the_fastest_peer_and_the_products() -> None:
    results = seconds(
        **{FORMULA: 8, OURS: 4, OUR_NLL: 5, "TRL fused LM head": 3, "torch cross_entropy": 2},
        **{"Liger FLCE, token scaling": 1, PRODUCTS: 0.5},
    )
    results["QuACK chunked"] = {"absent": "it needs a GPU"}
    found = ratios(results)
    # Token scaling is another objective, so that it is no peer of nll's.
    assert tables.fastest_peer(results) == "torch cross_entropy"
    assert found[OURS] == {
        "of_formula": 0.5,
        "of_our_nll": 0.8,
        "of_fastest_peer": 2,
        "products_share": 0.125,
    }
    assert "QuACK chunked" not in found
    assert ratios(seconds(**{OURS: 4})) == {OURS: {}}


def test_a_column_of_dashes_is_left_out_of_the_table() -> None:
    def columns(results: dict[str, dict[str, Any]]) -> list[str]:
        return [
            str(column.header).replace("\n", " ")
            for column in results_table(job(), results).columns
        ]

    own = seconds(**{FORMULA: 8, OURS: 4})
    own[OURS]["error"] = 1e-6
    assert columns(own) == [
        *("loss", "training ms", "of the formula", "evaluation ms", "extra MiB", "of the formula"),
        "gradients' error",
    ]
    more = columns(own | seconds(**{OUR_NLL: 5, PRODUCTS: 2, "torch cross_entropy": 2}))
    assert more[2:6] == ["of the formula", "of our nll", "of best peer", "products' share"]
    assert columns({OURS: {"absent": "out of memory"}}) == ["loss"]


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


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    results = {
        job(frozen=frozen, masked=0.5): {
            **seconds(**{FORMULA: 8, OURS: 4, OUR_NLL: 5, "TRL fused LM head": 3, PRODUCTS: 2}),
            "QuACK chunked": {"absent": "it needs a GPU"},
        }
        for frozen in (False, True)
    }
    results[job()] = {OURS: {"absent": "out of memory"}}
    files.write_files(results, tmp_path)
    assert files.read_results([tmp_path / "benchmark.csv"]) == results
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    with (tmp_path / "benchmark.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["contestant"] == OURS)
    assert float(row["of_fastest_peer"]) == pytest.approx(4 / 3)
    assert float(row["products_share"]) == 0.5
    # 3 products of 2 N V H, of the half that counts.
    assert float(row["teraflops"]) == pytest.approx(3 * 2 * 48 * 131 * 16 / 4 / 1e12)
