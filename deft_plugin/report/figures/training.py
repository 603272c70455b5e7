"""A run over its steps, and several beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..runs import COMPARED, Run
from .dress import LINES, Dress, axes_of, literal


def training_figure(run: Run) -> Callable[[Dress], Figure]:
    """Mean focus and probability over a run."""
    shown = {
        "mean_focus": "focus",
        "mean_target_probability": "probability of the target",
        "mean_gate": "gate",
    }

    def draw(dress: Dress) -> Figure:
        figure, axis = axes_of(7.6, 3.3)
        for (metric, label), colour in zip(shown.items(), dress.series, strict=False):
            trained, held_out = run.training(metric), run.held_out(metric)
            if trained:
                axis.plot(list(trained), list(trained.values()), color=colour, label=label)
            if held_out:
                axis.plot(
                    list(held_out), list(held_out.values()), "o", color=colour, markersize=5.5,
                    label=None if trained else label,
                )  # fmt: skip
        axis.set_ylim(-0.02, 1.02)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("mean over tokens")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
        return figure

    return draw


def comparison_figure(runs: Sequence[Run], metric: str) -> Callable[[Dress], Figure]:
    """One metric of several runs."""

    def draw(dress: Dress) -> Figure:
        columns = 2 if max(len(run.name) for run in runs) < 18 else 1
        figure, axis = axes_of(4.9, 2.7 + 0.2 * -(-len(runs) // columns))
        draw_comparison(axis, runs, metric, dress)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
        return figure

    return draw


def draw_comparison(axis: Axes, runs: Sequence[Run], metric: str, dress: Dress) -> None:
    """One metric of several runs in a panel: held out as dots, training as thin lines."""
    for index, run in enumerate(runs):
        colour = dress.series[index % len(dress.series)]
        line = LINES[(index // len(dress.series)) % len(LINES)]
        trained, held_out = run.training(metric), run.held_out(metric)
        label = literal(run.name if run.objective is None else f"{run.name} ({run.objective})")
        if trained:
            axis.plot(
                list(trained), list(trained.values()), color=colour, linestyle=line,
                alpha=0.45 if held_out else 1, linewidth=1.1 if held_out else 1.8,
                label=None if held_out else label,
            )  # fmt: skip
        if held_out:
            axis.plot(
                list(held_out), list(held_out.values()), color=colour, linestyle=line,
                marker="o", markersize=4.5, label=label,
            )  # fmt: skip
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(COMPARED[metric][1])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
