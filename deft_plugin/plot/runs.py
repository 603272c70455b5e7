"""Which picture it is to be: one run's, with its histograms beside it, or several compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from ..report.runs import Run, ends_before_its_run, file_beside, folders_of, load_runs
from ..telemetry import FILE_NAME, read_histograms
from .comparison import comparison_table, plot_comparison
from .histograms import plot_histograms
from .metrics import plot_metrics

SEVERAL = "deft-plot.png"


def plot_runs(
    paths: Sequence[str], output: Path | None = None, metrics: Sequence[str] = ()
) -> tuple[list[Path], Table | None, list[str]]:
    """Draw the metrics of runs.

    Args:
        paths: folders of runs, or their trainer_state.json files.
        output: the picture; by default metrics.png, or metrics-NAMES.png of those that were chosen, in the folder of one run,
            `SEVERAL` here for several.
        metrics: which to draw; none for all.

    Returns:
        The files that were written, a table of figures where several runs are compared, and what a reader should know
        of the logs.

    Raises:
        ValueError: there is no such run or metric, or the picture cannot be written.
    """
    runs = load_runs(paths, option="RUN")
    # As the log has them.
    metrics = tuple(name.removeprefix("eval_") for name in metrics)
    if not runs:
        raise ValueError("Name a RUN: a folder that a trainer wrote to, or a trainer_state.json.")
    notes = [note for run in runs if (note := ends_before_its_run(run)) is not None]
    several = len(runs) > 1
    # Not in a checkpoint's, which trainers delete.
    folder = folders_of(runs[0].path)[-1]
    # The picture of all is left as it is.
    default = folder / f"{'-'.join(['metrics', *dict.fromkeys(metrics)])}.png"
    picture = output or (Path(SEVERAL) if several else default)
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if picture.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(
            f"--output {str(picture)!r} has no suffix of a picture. Choices: {', '.join(formats)}."
        )
    try:
        if several:
            plot_comparison(runs, picture, metrics)
            return [picture], comparison_table(runs), notes
        plot_metrics(runs[0].history, picture, str(runs[0].path.parent), metrics)
        return [picture, *_plot_histograms_of(runs[0], picture)], None, notes
    except OSError as error:
        raise ValueError(f"--output {str(picture)!r} cannot be written: {error}.") from None


def _plot_histograms_of(run: Run, beside: Path) -> list[Path]:
    file = file_beside(run.path, FILE_NAME)
    entries = [] if file is None else read_histograms(file)
    written = []
    for split in dict.fromkeys(entry.split for entry in entries):
        own = [entry for entry in entries if entry.split == split]
        own.sort(key=lambda entry: entry.step)
        path = beside.with_name(f"histograms_{split}{beside.suffix}")
        plot_histograms(own, path, f"{run.path.parent}, {split}")
        written.append(path)
    return written
