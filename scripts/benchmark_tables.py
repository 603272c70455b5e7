"""What the benchmark's figures say: ratios, tables, a CSV and a plot."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from benchmark_job import Job
from contestants import FORMULA, OUR_NLL, OURS, PRODUCTS
from public_losses import PUBLIC_LOSSES
from rich.table import Table

from deft_plugin.ops.tiles import default_tile_rows

# A contestant's figures, or {"absent": why}.
Result = dict[str, Any]
Results = dict[Job, dict[str, Result]]

SLACK_MIB = 100
AIMS = (
    "Aims on a GPU: at most 1.02 of our nll; at most 1.00 of the fastest peer's from V = 128,000 on; at least 85 % of\n"
    f"the products' rate; peak extra memory at most tile, gradients and {SLACK_MIB} MiB."
)


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
    """Figures of all contestants on one job; training is a forward and a backward pass."""
    table = Table(title=job.title)
    table.add_column("loss", no_wrap=True)
    for column in (
        "training\nms",
        "of the\nformula",
        "of our\nnll",
        "of best\npeer",
        "products'\nshare",
        "evaluation\nms",
        "extra\nMiB",
        "of the\nformula",
        "gradients'\nerror",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    base = results.get(FORMULA, {})
    for name, ratio in ratios(results).items():
        result = results[name]
        memory = base.get("extra_mib", 0) / max(result["extra_mib"], 0.1)
        table.add_row(
            name,
            f"{result['seconds'] * 1000:,.1f}",
            _number(ratio.get("of_formula"), ".2f"),
            _number(ratio.get("of_our_nll"), ".2f"),
            _number(ratio.get("of_fastest_peer"), ".2f"),
            _number(ratio.get("products_share"), ".0%"),
            f"{result['evaluation_seconds'] * 1000:,.1f}",
            f"{result['extra_mib']:,.0f}",
            f"1/{memory:.1f}" if memory >= 1 else f"{1 / memory:.1f}" if memory else "-",
            _number(result["error"] or None, ".1e"),
        )
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


def summary_table(results: Results) -> Table:
    """deft_plugin's DEFT on every job, against our own nll, the fastest peer, the products and the memory's bound."""
    table = Table(title=OURS, caption=AIMS)
    table.add_column("job")
    for column in ("time", "of our nll", "of the fastest peer's nll", "products' share", "memory"):
        table.add_column(column, justify="right")
    for job, contestants in results.items():
        ratio = ratios(contestants).get(OURS)
        if ratio is None:
            table.add_row(job.title, contestants.get(OURS, {}).get("absent", "not measured"))
            continue
        ours = contestants[OURS]
        peer = _number(ratio.get("of_fastest_peer"), ".2f")
        table.add_row(
            job.title,
            f"{ours['seconds'] * 1000:,.1f} ms",
            _number(ratio.get("of_our_nll"), ".3f"),
            f"{peer} ({fastest_peer(contestants)})" if peer != "-" else "-",
            _number(ratio.get("products_share"), ".0%"),
            f"{ours['extra_mib']:,.0f} of {memory_bound_mib(job):,.0f} MiB",
        )
    return table


def _number(value: float | None, format_: str) -> str:
    return "-" if value is None else format(value, format_)


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """The rows, whose keys may differ, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def write_files(results: Results, output: Path) -> None:
    """The results as benchmark.csv and benchmark.png in `output`."""
    rows = []
    for job, contestants in results.items():
        compared = ratios(contestants)
        for name, result in contestants.items():
            row = {**asdict(job), "contestant": name, **result}
            if "seconds" in result:
                row |= compared[name] | {"teraflops": teraflops(job, result["seconds"])}
                row["memory_bound_mib"] = memory_bound_mib(job)
            rows.append(row)
    write_csv(rows, output / "benchmark.csv")
    plot(results, output / "benchmark.png")


def read_results(paths: list[Path]) -> Results:
    """What `write_files` wrote, of all files together; a later file's figures replace an earlier one's."""
    results: Results = {}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                job = Job(
                    **{field.name: _parsed(row[field.name], field.type) for field in fields(Job)}
                )
                result: Result = {
                    key: float(row[key])
                    for key in ("seconds", "evaluation_seconds", "extra_mib", "error")
                    if row.get(key)
                }
                result |= {key: row[key] for key in ("remark", "absent") if row.get(key)}
                results.setdefault(job, {})[row["contestant"]] = result
    return results


def _parsed(text: str, type_: Any) -> Any:
    """A field of a job as it was before it was written; annotations are strings here."""
    if type_ == "bool":
        return text == "True"
    return {"int": int, "float": float, "str": str}[type_](text)


def plot(results: Results, path: Path) -> None:
    """Bars of time, with its ratios, and of memory for every job."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    longest = max(len(contestants) for contestants in results.values())
    height = (0.6 + 0.2 * longest) * len(results)
    figure, axes = plt.subplots(
        len(results), 2, figsize=(12, 1 + height), squeeze=False, layout="constrained"
    )
    for (job, contestants), (left, right) in zip(results.items(), axes, strict=True):
        compared = ratios(contestants)
        names = list(compared)[::-1]
        peer = fastest_peer(contestants)
        colours = [
            "C1" if name.startswith("deft_plugin") else "C0" if name == peer else "C7"
            for name in names
        ]
        times = [contestants[name]["seconds"] * 1000 for name in names]
        bars = left.barh(names, times, color=colours)
        labels = [
            f"{time:,.1f} | {_number(compared[name].get('of_our_nll'), '.2f')}, "
            f"{_number(compared[name].get('of_fastest_peer'), '.2f')}, "
            f"{_number(compared[name].get('products_share'), '.0%')}"
            for name, time in zip(names, times, strict=True)
        ]
        left.bar_label(bars, labels, fontsize=6, padding=2)
        left.margins(x=0.35)
        if PRODUCTS in compared:
            left.axvline(contestants[PRODUCTS]["seconds"] * 1000, color="black", linewidth=0.7)
        left.set_title(
            f"{job.title}\nms | of our nll, of the fastest peer's (blue), products' share (line)",
            fontsize=8,
        )
        right.barh(names, [contestants[name]["extra_mib"] for name in names], color=colours)
        right.axvline(memory_bound_mib(job), color="black", linewidth=0.7)
        right.set_title("peak extra memory, MiB\nline: tile, gradients and 100 MiB", fontsize=8)
        right.set_yticklabels([])
        for axis in (left, right):
            axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
