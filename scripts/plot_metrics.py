"""Plot what the gates did in a run: objective and nll, focus and gate, entropy, accuracy.

python scripts/plot_metrics.py runs/demo/trainer_state.json      # writes runs/demo/metrics.png

With the run's gate_histograms.jsonl beside it, or beside its checkpoint, also histograms_training.png, histograms_eval.png.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import typer
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator

from deft_plugin.histograms import QUANTITIES
from deft_plugin.telemetry import FILE_NAME, LoggedHistograms, read_histograms

# Panels: title, metrics and their labels, whether the axis is [0, 1]. A panel without data is left out.
PANELS: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("Loss (nats per token)", {"objective_loss": "objective", "nll": "nll"}, False),
    (
        "Gate and what it is made of",
        {"mean_gate": "gate", "mean_focus": "focus", "mean_target_probability": "target probability"},
        True,
    ),
    ("Entropy of the predictions (nats)", {"entropy": "entropy"}, False),
    (
        "Share of tokens",
        {"mean_token_accuracy": "predicted right", "closed_gate_share": "gate below 0.1"},
        True,
    ),
)  # fmt: skip
# TRL's own losses are logged under this name alone.
OWN_LOSS = ("Loss", {"loss": "loss"}, False)


def plot_metrics(log_history: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the metrics of a trainer's log as a PNG at `path`: training as lines, held out as dots.

    Raises:
        ValueError: the log has none of the metrics.
    """
    logged = {name.removeprefix("eval_") for entry in log_history for name in entry}
    candidates = PANELS if "objective_loss" in logged else (OWN_LOSS, *PANELS)
    panels = [panel for panel in candidates if logged & panel[1].keys()]
    if not panels:
        raise ValueError(
            f"The log has no metrics to plot, only {', '.join(sorted(logged)) or 'no entries'}."
        )
    rows = (len(panels) + 1) // 2
    figure, axes = plt.subplots(
        rows, 2, figsize=(10, 0.5 + 3 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    figure.suptitle(f"{title}\nlines: training, dots: held out", fontsize=11)
    for axis, (panel, labels, is_share) in zip(axes.flat, panels, strict=False):
        for index, (name, label) in enumerate(labels.items()):
            trained = _series(log_history, name)
            held_out = _series(log_history, f"eval_{name}")
            if trained or held_out:
                axis.plot(*_columns(trained), color=f"C{index}", label=label)
                axis.plot(*_columns(held_out), "o", color=f"C{index}", markersize=5)
        axis.set_title(panel, fontsize=10)
        axis.tick_params(labelbottom=True)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if is_share:
            axis.set_ylim(-0.03, 1.03)
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.supxlabel("optimizer step", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_histograms(entries: Sequence[LoggedHistograms], path: Path, title: str) -> None:
    """Draw the histograms of one split as heat maps over steps: tokens by value, and by its power of ten."""
    names = [name for name in QUANTITIES if any(name in entry.histograms for entry in entries)]
    figure, axes = plt.subplots(
        len(names),
        2,
        figsize=(10, 0.5 + 3 * len(names)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
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
    plt.close(figure)


def _around(steps: Sequence[int]) -> list[float]:
    """Edges half-way between ascending steps, and as far before the first and after the last."""
    middles = [(step + following) / 2 for step, following in itertools.pairwise(steps)]
    first, last = middles[:1] or [steps[0] + 0.5], middles[-1:] or [steps[0] - 0.5]
    return [2 * steps[0] - first[0], *middles, 2 * steps[-1] - last[0]]


def _series(log_history: Sequence[dict[str, Any]], name: str) -> dict[int, float]:
    """Values by step; the last one where a step was logged twice."""
    return {entry["step"]: entry[name] for entry in log_history if name in entry}


def _columns(series: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(series), list(series.values())


def main(
    trainer_state: Path = typer.Argument(exists=True, dir_okay=False, help="trainer_state.json"),
    output: Path | None = typer.Option(None, help="PNG to write."),
) -> None:
    """Plot a run's trainer_state.json."""
    state = json.loads(trainer_state.read_text())
    path = output or trainer_state.with_name("metrics.png")
    plot_metrics(state["log_history"], path, str(trainer_state.parent))
    print(f"Written to {path}")
    folder = trainer_state.parent
    folders = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    for file in [parent / FILE_NAME for parent in folders if (parent / FILE_NAME).exists()][:1]:
        entries = read_histograms(file)
        for split in dict.fromkeys(entry.split for entry in entries):
            path = (output or trainer_state).with_name(f"histograms_{split}.png")
            own = [entry for entry in entries if entry.split == split]
            own.sort(key=lambda entry: entry.step)
            plot_histograms(own, path, f"{folder}, {split}")
            print(f"Written to {path}")


if __name__ == "__main__":
    typer.run(main)
