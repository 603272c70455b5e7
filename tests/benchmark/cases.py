"""Measurements small enough for a test, and figures to compare."""

from __future__ import annotations

from typing import Any

from deft_plugin.benchmark.job import Job


def job(**changes: Any) -> Job:
    """On a CPU, of a few tokens."""
    sizes = {"tokens": 96, "vocab": 131, "hidden": 16, "frozen": False, "dtype": "float32"}
    return Job(**{**sizes, "inputs": "trained", "device": "cpu", "repetitions": 1, **changes})


def seconds(**times: float) -> dict[str, dict[str, Any]]:
    """Results with these times."""
    return {
        name: {"seconds": time, "evaluation_seconds": time, "extra_mib": 10 * time, "error": 0.0}
        for name, time in times.items()
    }
