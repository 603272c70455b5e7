"""`deft plot`: the metrics of runs as a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import need, usage_errors


def plot(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Runs: folders that trainers wrote to, or trainer_state.json files.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The picture: .png, .svg, .pdf. By default metrics.png in the folder of one run, metrics-NAMES.png with --metric; deft-plot.png here for "
            "several."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="A metric to draw; may be repeated. By default all that were logged but scored_tokens; of several runs those that "
            "they are compared by."
        ),
    ] = None,
) -> None:
    """Draw the metrics of a run, or of several in one picture, over their optimizer steps.

    Several runs are compared by nll, accuracy and what the gates did, never by their own losses, which say nothing about each
    other. Beside one run's picture come its histograms, where it has logged some.

    \b
        deft plot out
        deft plot runs/nll runs/deft --metric nll --metric mean_token_accuracy --output compared.png
    """
    need("plot", "report", ("matplotlib",))
    from ..plot import plot_runs
    from .console import table_console

    with usage_errors("plot"):
        written, table, notes = plot_runs(runs, output, tuple(metric or ()))
    if table is not None:
        table_console().print(table)
    for path in written:
        print(f"Written to {path}")
    for note in notes:
        print(f"deft plot: {note}", file=sys.stderr)
