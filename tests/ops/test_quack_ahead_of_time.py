"""All products of path "quack" compile for Hopper and Blackwell, are QuACK's own but for the sums, and spill little.

`python -m tests.ops.quack_ahead_of_time` prints a table of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from .quack_ahead_of_time import compiled_elsewhere

pytest.importorskip("quack", reason="needs the extra `quack`")
pytestmark = pytest.mark.slow

# Bytes of a thread that are not in registers, a little above what the compiler reaches; QuACK's own is at 8 on Hopper.
MOST_STACK = {"sm_90a": 40, "sm_100a": 96}
# Products whose epilogue has sums, and those of the gradients, which Blackwell leaves to torch.
COUNTS = {"sm_90a": (7, 5), "sm_100a": (7, 0)}
SUMS = [
    ["powers", "target_logit"],
    ["powers", "squares", "target_logit"],
    ["powers", "target_logit", "weighted"],
    ["powers", "squares", "target_logit", "weighted"],
]


@pytest.mark.parametrize("target", MOST_STACK)
def test_every_product_compiles(target: str) -> None:
    reports, quacks_own = compiled_elsewhere(target)
    between = [report for report in reports if "kernel" in report]
    assert {(report["STORED"], report["COLLISION"], report["ENTROPY"]) for report in between} == {
        *itertools.product([True], [False, True], [False, True]),
        (False, True, True),
    }
    assert all(report["spilled"] == 0 for report in between)
    reports = [report for report in reports if "kernel" not in report]
    with_sums = [report for report in reports if report["sums"]]
    of_gradients = [report for report in reports if not report["sums"]]
    assert (len(with_sums), len(of_gradients)) == COUNTS[target]
    for report in reports:
        assert report["target"] == target, report
        assert report["stack"] <= MOST_STACK[target], report
    assert [report["sums"] for report in with_sums[:4]] == SUMS
    assert {report["options"]["tile_N"] for report in with_sums} == {128, 192, 256}
    # The sums rely on it: a multiply-add that is rounded once makes the exponent, and one each sum.
    (report,) = (report for report in with_sums if "fused" in report)
    assert report["fused"] >= least_fused(target, report)
    assert report["multiplications"] < 40
    if target == "sm_90a":
        check_as_quacks_own(reports, quacks_own)


def least_fused(target: str, report: dict[str, Any]) -> float:
    """Multiply-adds of a thread: of the exponent and of each sum but the first, which is an addition."""
    logits = report["options"]["tile_N"]
    if target == "sm_100a" or not report["options"]["pingpong"]:
        # Two at a time on Blackwell; two groups of threads for one block on Hopper.
        logits /= 2
    return 0.9 * logits * (len(report["sums"]) - 1)


def check_as_quacks_own(reports: list[dict[str, Any]], quacks_own: list[dict[str, Any]]) -> None:
    """The launches of QuACK's own loss are among ours, with the same operands, blocks and clusters."""
    assert len(quacks_own) == 6
    product, dx, first_dw, *_, later_dw = quacks_own
    assert (product["sums"], later_dw["keep"]) == (["sum_exp", "target_logit"], True)
    usual = next(report for report in reports if report["sums"])
    assert usual["operands"] == product["operands"]
    assert usual["options"] == product["options"]
    for own in (dx, first_dw, later_dw):
        (ours,) = (
            report
            for report in reports
            if (report["strips"], report["keep"], report["options"])
            == (own["strips"], own["keep"], own["options"])
            and report["dtype"] == own["dtype"]
        )
        # The weight's gradient is formed of larger tiles than this call's of QuACK.
        if own is dx:
            assert ours["operands"] == own["operands"]
        else:
            assert ours["operands"][2] == own["operands"][2]
