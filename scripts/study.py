"""The study: which objective when, measured. Regimes x objectives x seeds, with corrupted answers and without.

    python scripts/study.py small                     # the shipped base model: about an hour and a half on two cores
    python scripts/study.py real                      # SmolLM2-135M, LoRA: some hours on two cores, minutes on a GPU
    python scripts/study.py real --model Qwen/Qwen3-0.6B-Base --train-rows 1500 --output runs/study/qwen.csv
    python scripts/study.py tables                    # docs/study.md out of the results files

An objective's learning rate is chosen for each data set and, at the small scale, share of corrupted answers, from the same grid on
a clean validation split: of the rates whose score is within a standard error of the best one's, that with the lowest nll. The test split is
then measured for each seed, which draws the training rows, which of them are corrupted, and their order, alike for
every objective. A finished run is a line of the results file at once, and what is there is not run again: Ctrl-C and the same
command go on. What the columns mean: study_measure.held_out_figures; `other_nll` is that of text or tasks that
were not trained on.
"""

from __future__ import annotations

import process_setup  # noqa: F401

# isort: split
import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from real_data import DATA_SETS, get_real_data
from real_model import NAME, get_real_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from study_data import HELD_OUT
from study_results import BASE, Results, Run, append_result, read_results
from study_run import ON_GPU, SCALES, Scale, perform, quieten
from study_tables import write_page

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "study"
# By data set; others are clean alone.
CORRUPTED = {"string_insertion": (0.0, 0.1, 0.2, 0.4), "medmcqa": (0.0, 0.4), "asdiv": (0.0, 0.4)}
GRID_SEED = 0

console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def all_runs(
    results: Results, scale: Scale, names: Sequence[str], seeds: int
) -> tuple[list[Run], int]:
    """The runs that can be done now and have not been, and how many there are in all, in the order of their use.

    Those on the test split wait for all of the grid's for the same data set and objective.
    """
    runs: list[Run] = []
    waiting = 0
    for name in names:
        runs.append(Run(name, 0.0, BASE, 0.0, GRID_SEED, "test"))
        for corrupted in CORRUPTED.get(name, (0.0,)):
            for objective in scale.objectives:
                on = 0.0 if scale.chooses_on_clean else corrupted
                grid = [
                    Run(name, on, objective, rate, GRID_SEED, "validation")
                    for rate in scale.learning_rates
                ]
                runs += [run for run in grid if run not in runs]
                if any(run not in results for run in grid):
                    waiting += seeds
                    continue
                rate = best_learning_rate({run: results[run] for run in grid})
                runs += [
                    Run(name, corrupted, objective, rate, seed, "test")
                    for seed in range(1, seeds + 1)
                ]
    due = [run for run in runs if run not in results]
    return due, len(runs) + waiting


def best_learning_rate(grid: Results) -> float:
    """Of the rates whose score is within a standard error of the best one's, that with the lowest nll.

    Of those whose run has not ended in NaN; the lowest rate where none has not.
    """
    scores = {
        run: float(line["score"])
        for run, line in grid.items()
        if math.isfinite(float(line["score"])) and math.isfinite(float(line["nll"]))
    }
    if not scores:
        return min(run.learning_rate for run in grid)
    best = max(scores.values())
    error = math.sqrt(max(best * (1 - best), 0.0) / HELD_OUT["validation"])
    near = [run for run, score in scores.items() if score >= best - error]
    return min(near, key=lambda run: float(grid[run]["nll"])).learning_rate


def _prepare_process(threads: int) -> None:
    torch.set_num_threads(threads)
    quieten()


def run_study(path: Path, scale: Scale, names: Sequence[str], seeds: int, workers: int) -> None:
    """Do all runs that are not in the results file yet, several at a time."""
    results = read_results(path)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")
    running: dict[Future[Any], Run] = {}
    with (
        Progress(*columns, console=console, speed_estimate_period=3600) as progress,
        ProcessPoolExecutor(workers, context, _prepare_process, (threads,)) as pool,
    ):
        bar = progress.add_task(path.stem)
        try:
            while True:
                due, total = all_runs(results, scale, names, seeds)
                due = [run for run in due if run not in running.values()]
                progress.update(bar, completed=len(results), total=total)
                for run in due[: workers - len(running)]:
                    running[pool.submit(perform, run, scale)] = run
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    figures = future.result()
                    append_result(path, run, figures)
                    results[run] = {name: str(value) for name, value in figures.items()}
                    console.print(_said(run, figures), highlight=False, soft_wrap=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _said(run: Run, figures: dict[str, Any]) -> str:
    return (
        f"{run.data:16} {run.corrupted:4.0%} {run.objective:12} {run.learning_rate:7.0e} {run.split:10} seed "
        f"{run.seed}  nll {figures['nll']:6.3f}  score {figures['score']:6.1%}  {figures['seconds']:4.0f} s"
    )


Output = Annotated[Path | None, typer.Option(help="The results file; by default in docs/study.")]
Seeds = Annotated[int, typer.Option(min=1, help="Seeds on the test split.")]
Workers = Annotated[int, typer.Option(min=1, help="Runs at a time.")]
Data = Annotated[
    list[str] | None, typer.Option("--data", help="One of its data sets; may be repeated.")
]
AT_A_TIME = 1 if ON_GPU else max(1, torch.get_num_threads())


@app.command()
def small(
    output: Output = None, seeds: Seeds = 5, workers: Workers = AT_A_TIME, data: Data = None
) -> None:
    """The shipped base model, all of whose parameters are trained."""
    _start("small", SCALES["small"], output, seeds, workers, data)


@app.command()
def real(
    output: Output = None,
    seeds: Seeds = 3,
    workers: Workers = AT_A_TIME,
    data: Data = None,
    model: Annotated[str, typer.Option(help="A folder, or a name on the hub.")] = "smollm2",
    train_rows: Annotated[int | None, typer.Option(min=1, help="Rows that a run sees.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows a step.")] = None,
    all_objectives: Annotated[
        bool, typer.Option(help="Also those that only the small scale has.")
    ] = False,
) -> None:
    """SmolLM2-135M-Instruct, or another model with a chat template, with LoRA."""
    scale = replace(SCALES["real"], model=model)
    if train_rows:
        scale = replace(scale, train_rows=train_rows)
    if batch_size:
        scale = replace(scale, batch_size=batch_size)
    if all_objectives:
        scale = replace(scale, objectives=SCALES["small"].objectives)
    if scale != SCALES["real"] and output is None:
        raise typer.BadParameter("--output: another study than the one in docs/study needs a file.")
    _start("real", scale, output, seeds, workers, data)


@app.command()
def tables() -> None:
    """Write docs/study.md and its plots."""
    try:
        write_page(RESULTS)
    except ValueError as error:
        raise typer.BadParameter(f"{RESULTS} has a damaged file: {error}") from None


def _start(
    name: str, scale: Scale, output: Path | None, seeds: int, workers: int, data: list[str] | None
) -> None:
    for each in data or ():
        if each not in scale.data:
            raise typer.BadParameter(f"--data {each!r} is none of {', '.join(scale.data)}.")
    path = output or RESULTS / f"{name}.csv"
    try:
        # Before the processes do, all at once.
        if scale.model == NAME:
            get_real_model()
        for each in data or scale.data:
            if each in DATA_SETS:
                get_real_data(each)
    except RuntimeError as error:
        raise typer.BadParameter(" ".join(str(error).split())) from None
    run_study(path, scale, data or list(scale.data), seeds, workers)


if __name__ == "__main__":
    app()
