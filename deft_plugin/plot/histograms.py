"""The histograms of one run, as heat maps over its steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..histograms import QUANTITIES
from ..telemetry import LoggedHistograms


def plot_histograms(entries: Sequence[LoggedHistograms], path: Path, title: str) -> None:
    """Draw the histograms of one split as heat maps over steps: tokens by value, and by its power of ten."""
    names = [name for name in QUANTITIES if any(name in entry.histograms for entry in entries)]
    figure = Figure(figsize=(10, 0.5 + 3 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 2, sharex=True, squeeze=False)
    figure.suptitle(title, fontsize=11)
    for row, name in zip(axes, names, strict=True):
        logged = [entry for entry in entries if name in entry.histograms]
        steps = _around([entry.step for entry in logged])
        histograms = [entry.histograms[name] for entry in logged]
        for axis, views, label in (
            (row[0], [histogram.linear() for histogram in histograms], "{}"),
            (row[1], [histogram.log10() for histogram in histograms], "log10 of {}"),
        ):
            # Those with values above 1 have a bin more.
            edges = max((edges for edges, _ in views), key=len)
            shares = np.zeros((len(edges) - 1, len(views)))
            for column, (_, counts) in enumerate(views):
                shares[: len(counts), column] = np.array(counts) / sum(counts)
            # Bins without tokens stay white.
            cells = np.ma.masked_equal(shares, 0)
            mesh = axis.pcolormesh(steps, edges, cells, norm=PowerNorm(0.5, 0, 1))
            lowest = edges[np.flatnonzero(shares.sum(1))[0]]
            axis.set_ylim(bottom=min(lowest, -4) if label != "{}" else 0)
            axis.set_ylabel(label.format(name.replace("_", " ")), fontsize=10)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.tick_params(labelbottom=True)
    figure.colorbar(mesh, ax=axes, label="share of tokens")
    figure.supxlabel("optimizer step", fontsize=10)
    figure.savefig(path, dpi=130)


def _around(steps: Sequence[int]) -> list[float]:
    """Edges half-way between ascending steps, and as far before the first and after the last."""
    middles = [(step + following) / 2 for step, following in itertools.pairwise(steps)]
    first, last = middles[:1] or [steps[0] + 0.5], middles[-1:] or [steps[0] - 0.5]
    return [2 * steps[0] - first[0], *middles, 2 * steps[-1] - last[0]]
