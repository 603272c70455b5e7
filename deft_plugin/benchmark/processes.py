"""Every contestant in processes of its own, one after the other."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from .contestant import Machine
from .contestants import CONTESTANTS
from .job import Job
from .tables import Result, Results

# Some peers compile and tune for minutes.
LIMIT_SECONDS = 1800


def run_workers(
    names: Sequence[str],
    jobs: Sequence[Job],
    limit_seconds: float = LIMIT_SECONDS,
    console: Console | None = None,
) -> Results:
    """Every contestant's result on every job that it can run, each contestant in processes of its own.

    Args:
        names: of `CONTESTANTS`.
        jobs: all for one device.
        limit_seconds: after which a process is stopped.
        console: for a line that says what is running; None for none.
    """
    results: Results = {job: {} for job in jobs}
    machine = Machine.here(jobs[0].device)
    for name in names:
        fit: list[Job] = []
        for job in jobs:
            if reason := CONTESTANTS[name].needs.unmet(machine, job):
                results[job][name] = {"absent": reason}
            else:
                fit.append(job)
        # The resident set of a process that has run before says nothing: on a CPU a process a job.
        size = 1 if machine.device == "cpu" else len(jobs)
        for start in range(0, len(fit), size):
            batch = fit[start : start + size]
            running = console.status(f"{name}: {batch[0].title}") if console else None
            with running or contextlib.nullcontext():
                found = run_worker(name, batch, limit_seconds)
            for job, result in zip(batch, found, strict=True):
                results[job][name] = result
    return results


def run_worker(name: str, jobs: Sequence[Job], limit_seconds: float) -> list[Result]:
    """One contestant's results on the jobs, in a process of its own."""
    request = json.dumps({"name": name, "jobs": [asdict(job) for job in jobs]})
    process = subprocess.Popen(
        [sys.executable, "-m", "deft_plugin.benchmark.worker", request],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=limit_seconds)
        last = (errors.strip() or f"exit code {process.returncode}").splitlines()[-1]
        ended = f"its process ended early: {last[:120]}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        ended = f"it was stopped after {limit_seconds:,.0f} s"
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return results + [{"absent": ended}] * (len(jobs) - len(results))
