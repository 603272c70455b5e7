"""Bars of time and memory, a pair for each job."""

from __future__ import annotations

from pathlib import Path

from .contestants import PRODUCTS
from .tables import Results, fastest_peer, memory_bound_mib, number, ratios


def draw(results: Results, path: Path) -> None:
    """Bars of time, with its ratios, and of memory for every job."""
    from matplotlib.figure import Figure

    longest = max(len(contestants) for contestants in results.values())
    height = (0.6 + 0.2 * longest) * len(results)
    figure = Figure(figsize=(12, 1 + height), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
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
            f"{time:,.1f} | {number(compared[name].get('of_our_nll'), '.2f')}, "
            f"{number(compared[name].get('of_fastest_peer'), '.2f')}, "
            f"{number(compared[name].get('products_share'), '.0%')}"
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
