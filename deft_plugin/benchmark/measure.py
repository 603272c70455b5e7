"""Time, peak memory and error of one contestant, in a process of its own."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contestant import Loss, UnavailableError
from .contestants import CONTESTANTS, formula
from .job import Job, make_inputs

# Enough for the multiples that some contestants need.
SMALL = {"tokens": 128, "vocab": 1024, "hidden": 64}
CHECKED_TOKENS = 256


def gradients(
    loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, frozen: bool
) -> list[Tensor]:
    """One forward and backward; the gradients of the hidden states and, unless frozen, the weight."""
    leaves = [hidden.detach().requires_grad_()]
    weight = weight.detach().requires_grad_(not frozen)
    if not frozen:
        leaves.append(weight)
    loss(leaves[0], weight, targets).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@torch.no_grad()
def evaluate(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, frozen: bool) -> Tensor:
    """One forward as a trainer evaluates: without gradients, the weight being a parameter if it is trainable."""
    return loss(hidden, weight.detach().requires_grad_(not frozen), targets)


def median_seconds(run: Callable[[int], object], repetitions: int, device: str) -> float:
    """Median time of `run(repetition)`."""
    times = []
    for repetition in range(repetitions):
        if device == "cpu":
            start = time.perf_counter()
            run(repetition)
            times.append(time.perf_counter() - start)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(repetition)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def peak_extra_mib(run: Callable[[], object], device: str) -> float:
    """Highest memory during `run` less the memory before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    resident = _resident_kib("VmRSS")
    run()
    return (_resident_kib("VmHWM") - resident) / 1024


def _resident_kib(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its highest since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"{field} is not in /proc/self/status: the CPU benchmark needs Linux.")


def measure(loss: Loss, objective: str, job: Job) -> dict[str, float]:
    """Measure one contestant in this process."""
    small = replace(job, **SMALL)  # type: ignore[arg-type]
    gradients(loss, *make_inputs(small, small.tokens, 1), job.frozen)
    rotation = [make_inputs(job, job.tokens, seed) for seed in range(3)]
    if job.device != "cpu":
        # A GPU's allocator counts exactly; what is compiled or tuned for these shapes must not be timed.
        for inputs in rotation:
            gradients(loss, *inputs, job.frozen)
    extra = peak_extra_mib(lambda: gradients(loss, *rotation[0], job.frozen), job.device)
    both = median_seconds(
        lambda i: gradients(loss, *rotation[(i + 1) % 3], job.frozen), job.repetitions, job.device
    )
    evaluate(loss, *rotation[0], job.frozen)
    evaluation = median_seconds(
        lambda i: evaluate(loss, *rotation[(i + 1) % 3], job.frozen), job.repetitions, job.device
    )
    return {
        "seconds": both,
        "evaluation_seconds": evaluation,
        "extra_mib": extra,
        "error": gradient_error(loss, objective, job) if objective else 0.0,
    }


def gradient_error(loss: Loss, objective: str, job: Job) -> float:
    """The largest relative error (Frobenius norm) of the gradients against the formula in float64."""
    hidden, weight, targets = make_inputs(job, CHECKED_TOKENS, 9)
    exact = gradients(formula(objective), hidden.double(), weight.double(), targets, job.frozen)
    found = gradients(loss, hidden, weight, targets, job.frozen)
    return max(
        ((ours.double() - truth).norm() / truth.norm()).item()
        for ours, truth in zip(found, exact, strict=True)
    )


def work(name: str, jobs: list[Job]) -> None:
    """Measure one contestant on jobs that fit its needs; a line of JSON each."""
    contestant = CONTESTANTS[name]
    loss: Loss | None = None
    for job in jobs:
        try:
            loss = loss or contestant.build()
            figures = measure(loss, contestant.objective, job)
            result: dict[str, Any] = {**figures, "remark": contestant.remark}
        except UnavailableError as error:
            result = {"absent": str(error)}
        except torch.OutOfMemoryError:
            result = {"absent": "out of memory"}
        except Exception as error:  # A peer's own failure is a result too.
            message = (str(error).strip() or "no message").splitlines()[0]
            result = {"absent": f"{type(error).__name__}: {message[:120]}"}
        print(json.dumps(result), flush=True)
        if job.device != "cpu":
            torch.cuda.empty_cache()
