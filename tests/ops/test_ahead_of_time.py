"""The kernel compiles for GPUs that are not here, without spilling, and its loops are as lean as they were made.

`python -m tests.ops.ahead_of_time` does the same with every combination and prints a table.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from .ahead_of_time import CUDA, ROCM, cases, compiled_elsewhere

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


def most_instructions(case: dict[str, Any]) -> float:
    """Of an element in both loops, a little above what the compiler reaches."""
    most = 19.0 if case["statistics"] != "all" else 22.5
    most += 1.5 * (case["vocab_size"] % 16 != 0) + 8.0 * case["has_bias"]
    most += 26.0 * (case["softcap"] is not None)
    most += 14.0 * (case["softcap"] == 1e4)  # Far above the logits, tanh's series comes on top.
    return most


def test_it_compiles_for_nvidia() -> None:
    jobs = [*itertools.product(cases(), CUDA)]
    for job, report in zip(jobs, compiled_elsewhere(jobs), strict=True):
        case, _ = job
        if case["dtype"] == "float64":
            continue  # Right, and slow.
        assert report["spilled"] == 0, job
        loops = report["loops"]
        assert len(loops) == 1 + case["write_error"], job
        for loop in loops:
            memory = [name for name in loop if re.match(r"LDG|STG|LDL|STL", name)]
            assert memory, job
            assert all("128" in name for name in memory), (job, memory)
            assert not any(name.startswith("BAR") for name in loop), job
        instructions = sum(sum(loop.values()) for loop in loops) / report["elements"]
        assert instructions <= most_instructions(case), job


def test_it_compiles_for_amd() -> None:
    jobs = [*itertools.product(cases(), ROCM)]
    for job, report in zip(jobs, compiled_elsewhere(jobs), strict=True):
        case, _ = job
        assert "global_load_dwordx4" in report["assembly"], job
        if case["dtype"] != "float64":
            assert report["spilled"] == 0, job
