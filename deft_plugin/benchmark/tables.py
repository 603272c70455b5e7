"""What the figures say: ratios, rates, what the memory should be at most, and a job's table."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from rich.table import Table

from ..ops.tiles import default_tile_rows
from .contestants import FORMULA, OUR_NLL, PRODUCTS
from .job import Job
from .public_losses import PUBLIC_LOSSES

# A contestant's figures, or {"absent": why}.
Result = dict[str, Any]
Results = dict[Job, dict[str, Result]]

SLACK_MIB = 100


def ratios(results: dict[str, Result]) -> dict[str, dict[str, float]]:
    """Each contestant's time over others' on the same job, where these have run.

    Returns:
        By contestant: "of_formula", "of_our_nll", "of_fastest_peer", and "products_share", the products' time
        over its own.
    """
    present = {name: result["seconds"] for name, result in results.items() if "seconds" in result}
    peer = fastest_peer(results)
    found: dict[str, dict[str, float]] = {}
    for name, seconds in present.items():
        found[name] = {
            key: seconds / present[other]
            for key, other in (
                ("of_formula", FORMULA),
                ("of_our_nll", OUR_NLL),
                ("of_fastest_peer", peer),
            )
            if other in present
        }
        if PRODUCTS in present:
            found[name]["products_share"] = present[PRODUCTS] / seconds
    return found


def fastest_peer(results: dict[str, Result]) -> str | None:
    """The public loss that computes nll in the least time; None if none has run."""
    times = {
        name: result["seconds"]
        for name, result in results.items()
        if "seconds" in result and name in PUBLIC_LOSSES and PUBLIC_LOSSES[name].objective == "nll"
    }
    return min(times, key=lambda name: times[name], default=None)


def teraflops(job: Job, seconds: float) -> float:
    """Rate of the products that a loss has to pay, those of masked labels left out."""
    products = 2 if job.frozen else 3
    counted = job.tokens - job.masked_tokens
    return 2 * products * counted * job.vocab * job.hidden / seconds / 1e12


def memory_bound_mib(job: Job) -> float:
    """One tile of logits, the gradients (the weight's in float32, as tiles are summed) and some slack."""
    dtype = getattr(torch, job.dtype)
    device = torch.device(job.device)
    counted = job.tokens - job.masked_tokens
    # PyTorch folds in float32, Triton in the model's dtype.
    buffer_dtype = torch.promote_types(dtype, torch.float32) if job.device == "cpu" else dtype
    rows = default_tile_rows(counted, job.vocab, buffer_dtype, device, trainable=not job.frozen)
    tile = min(rows, counted) * job.vocab * buffer_dtype.itemsize
    gradients = job.tokens * job.hidden * dtype.itemsize
    if not job.frozen:
        gradients += job.vocab * job.hidden * 4
    return (tile + gradients) / 2**20 + SLACK_MIB


def results_table(job: Job, results: dict[str, Result]) -> Table:
    """Figures of all contestants on one job, by columns that have some; training is a forward and a backward pass."""
    columns = (
        "training\nms",
        "of the\nformula",
        "of our\nnll",
        "of best\npeer",
        "products'\nshare",
        "evaluation\nms",
        "extra\nMiB",
        "of the\nformula",
        "gradients'\nerror",
    )
    rows: dict[str, tuple[str, ...]] = {}
    base = results.get(FORMULA, {})
    for name, ratio in ratios(results).items():
        result = results[name]
        memory = base.get("extra_mib", 0) / max(result["extra_mib"], 0.1)
        rows[name] = (
            f"{result['seconds'] * 1000:,.1f}",
            number(ratio.get("of_formula"), ".2f"),
            number(ratio.get("of_our_nll"), ".2f"),
            number(ratio.get("of_fastest_peer"), ".2f"),
            number(ratio.get("products_share"), ".0%"),
            f"{result['evaluation_seconds'] * 1000:,.1f}",
            f"{result['extra_mib']:,.0f}",
            f"1/{memory:.1f}" if memory >= 1 else f"{1 / memory:.1f}" if memory else "-",
            number(result["error"] or None, ".1e"),
        )
    # Ratios to contestants that were left out are dashes.
    has_figures = [any(cell != "-" for cell in cells) for cells in zip(*rows.values(), strict=True)]
    table = Table(title=job.title)
    table.add_column("loss", no_wrap=True)
    for column in itertools.compress(columns, has_figures):
        table.add_column(column, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *itertools.compress(cells, has_figures))
    return table


def remarks(results: dict[str, Result]) -> list[str]:
    """Lines under a job's table: what a reader of the figures has to know, and who is not in it and why."""
    absent: dict[str, list[str]] = {}
    for name, result in results.items():
        if "absent" in result:
            absent.setdefault(result["absent"], []).append(name)
    return [
        f"{name}: {result['remark']}" for name, result in results.items() if result.get("remark")
    ] + [f"not measured, since {reason}: {'; '.join(names)}" for reason, names in absent.items()]


def number(value: float | None, format_: str) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else format(value, format_)
