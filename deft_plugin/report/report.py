"""A report from beginning to end: rows, measurements, numbers, figures, page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .analysis import check_objectives
from .content import content_of
from .export import write_json
from .measured import measure_data
from .options import Options, check_together
from .output import writing_to
from .page import render
from .progress import progress_on
from .runs import COMPARED, Run, compared_metrics, load_run, load_runs

__all__ = ["Options", "make_report"]


def make_report(options: Options, console: Console | None = None) -> Path:
    """Write report.html, report.json, tokens.csv, rows.csv and figures/*.png; return the page's path.

    Args:
        options: what to look at.
        console: for progress bars; None for none.

    Raises:
        ValueError: an option that does not fit; the message names it, its value and the choices. Everything that can be
            known before a model is loaded is found before.
    """
    check_together(options)
    names = check_objectives(options.objectives, options.objective)
    runs = load_runs(options.compare)
    run = None if options.run is None else load_run(options.run, option="--run")
    _check_course(run)
    _check_comparison(runs)
    with progress_on(console) as steps:
        measured = None if options.model is None else measure_data(options, names, steps)
        with writing_to(options.output):
            (options.output / "figures").mkdir(parents=True, exist_ok=True)
            content, numbers = content_of(options, names, measured, run, runs, steps)
            for each in content.pictures.values():
                (options.output / "figures" / f"{each.name}.png").write_bytes(each.light)
                (options.output / "figures" / f"{each.name}-dark.png").write_bytes(each.dark)
            write_json(options.output / "report.json", numbers)
            page = options.output / "report.html"
            page.write_text(render(content), encoding="utf-8")
    return page


def _check_course(run: Run | None) -> None:
    shown = ("mean_focus", "mean_target_probability")
    if run is not None and not any(run.training(m) or run.held_out(m) for m in shown):
        raise ValueError(
            f"--run {str(run.path)!r} has logged none of {', '.join(shown)}: TRL's own losses do not. Name a run with "
            "an objective of deft_plugin."
        )


def _check_comparison(runs: Sequence[Run]) -> None:
    if len(runs) == 1:
        raise ValueError(
            f"--compare {str(runs[0].path)!r} is one run, and two are needed to compare. Of one run: --run."
        )
    if runs and not compared_metrics(runs) and not any(run.task for run in runs):
        raise ValueError(
            f"--compare: none of the runs {', '.join(run.name for run in runs)} has logged one of {', '.join(COMPARED)}: "
            "TRL's own losses do not. Name runs with an objective of deft_plugin."
        )
