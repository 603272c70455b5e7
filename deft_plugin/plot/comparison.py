"""Several runs: a panel for each metric that they can be compared by, and a table of their figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from ..report.figures.dress import LIGHT
from ..report.figures.training import draw_comparison
from ..report.runs import COMPARED, Run, compared_metrics, figures_of

_LOSSES = ("loss", "objective_loss")


def plot_comparison(runs: Sequence[Run], path: Path, metrics: Sequence[str] = ()) -> None:
    """Draw metrics of several runs at `path`: held out as dots, training as thin lines.

    Args:
        runs: under names that differ.
        path: of the picture; its suffix is its format, and its folder is made where it is missing.
        metrics: some of `COMPARED`; none for all that were logged.

    Raises:
        ValueError: a metric that says nothing across objectives, is unknown, or was logged by none.
    """
    logged = compared_metrics(runs)
    for name in metrics:
        if name in _LOSSES:
            raise ValueError(
                f"--metric {name!r} of one objective says nothing about that of another. Choices: {', '.join(COMPARED)}."
            )
        if name not in COMPARED:
            raise ValueError(
                f"--metric {name!r} is none that several runs are compared by. Choices: {', '.join(COMPARED)}."
            )
        if name not in logged:
            raise ValueError(
                f"--metric {name!r} was logged by none of the runs. Of the choices there are: "
                f"{', '.join(logged) or 'none'}."
            )
    shown = list(dict.fromkeys(metrics)) or logged
    if not shown:
        raise ValueError(
            f"None of the runs {', '.join(run.name for run in runs)} has logged one of: {', '.join(COMPARED)}. TRL's own "
            "losses do not; alpha with a = 0 is an nll that does."
        )
    columns = min(len(shown), 2)
    rows = -(-len(shown) // columns)
    with matplotlib.rc_context(LIGHT.settings()):
        figure = Figure(figsize=(5.2 * columns, 2.7 * rows + 0.5), layout="constrained")
        axes = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
        for axis, metric in zip(axes, shown, strict=False):
            draw_comparison(axis, runs, metric, LIGHT)
            axis.set_title(COMPARED[metric][0])
            # Their scales and units differ; steps are the same.
            axis.set_xlabel("")
        # A column that ends above the last row.
        for axis in axes[len(shown) - columns : len(shown)]:
            axis.tick_params(labelbottom=True)
            axis.set_xlabel("optimizer step")
        for axis in axes[len(shown) :]:
            axis.remove()
        # A run may have logged some of the metrics alone.
        handles = {
            label: handle
            for axis in axes[: len(shown)]
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        counts = {figures_of(run).held_out_tokens for run in runs}
        # Where the runs differ the table has it alone.
        count = counts.pop() if len(counts) == 1 else None
        tokens = "" if count is None else f" ({count:,} tokens)"
        figure.suptitle(f"dots: held out{tokens}, thin lines: training", fontsize=9)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def comparison_table(runs: Sequence[Run]) -> Table:
    """A line for each run: its nll, accuracy and figures of the task, and how many tokens they rest on."""
    lines = [figures_of(run) for run in runs]
    tasks = sorted({name for line in lines for name in line.task})
    table = Table(
        "run",
        "objective",
        "steps",
        "rows",
        "held-out tokens",
        "nll, best",
        "nll, last",
        "accuracy",
        *map(escape, tasks),
    )
    for line in lines:
        accuracy = line.last.get("mean_token_accuracy")
        figures = [line.nll_best, line.nll_last, accuracy, *(line.task.get(name) for name in tasks)]
        table.add_row(
            escape(line.name),
            escape(line.objective or "-"),
            str(line.steps),
            "held out" if line.held_out else "training",
            "-" if line.held_out_tokens is None else f"{line.held_out_tokens:,}",
            *("-" if figure is None else f"{figure:.3f}" for figure in figures),
        )
    return table
