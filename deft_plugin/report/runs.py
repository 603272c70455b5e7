"""Logs of training runs: one for its course, several to compare.

A run is what transformers' trainers leave behind: trainer_state.json, in the run's folder or in that of its newest checkpoint.
Beside it this package's trainers write objective.json, and `scripts/train.py` results.json, with the figures of the task.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STATE = "trainer_state.json"
RESULTS = "results.json"
# Of `run_log`, which needs transformers.
OBJECTIVE = "objective.json"
Series = dict[float, float]

# What runs are compared by: title, and unit.
COMPARED = {
    "nll": ("Negative log-likelihood", "nats per token"),
    "mean_token_accuracy": ("Token accuracy", "share of first choices"),
    "mean_target_probability": ("Probability of the target", "mean over tokens"),
    "mean_gate": ("Gate", "mean over tokens"),
    "closed_gate_share": ("Closed gates", "share of gates below 0.1"),
}
# Losses, whose size depends on the objective, and what says nothing about the model.
_NOT_COMPARED = (
    "loss",
    "objective_loss",
    "perplexity",
    "entropy",
    # Of each objective's own exponent.
    "mean_focus",
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "tokens_per_second",
    "model_preparation_time",
    "num_tokens",
    "num_input_tokens_seen",
    "scored_tokens",
    "skipped_share",
)
# The only losses that train without this package's metrics.
_TRLS_OWN = ("nll", "dft")
_NOT_COMPARED_ENDS = tuple(f"_{name}" for name in _NOT_COMPARED)


@dataclass(frozen=True)
class Run:
    """The log of one run.

    Args:
        name: short, different from the other runs'.
        path: of its trainer_state.json.
        objective: where objective.json or results.json names it.
        steps: optimizer steps that it has made.
        history: the log's entries.
        task: figures of the task after training, by name.
    """

    name: str
    path: Path
    objective: str | None
    steps: int
    history: list[dict[str, Any]]
    task: dict[str, float] = field(default_factory=dict)

    def held_out(self, metric: str) -> Series:
        """Values of the evaluations."""
        values = series_of(self.history, f"eval_{metric}")
        # TRL's own nll logs its loss under that name alone.
        if metric == "nll" and not values and self.objective == "nll":
            return series_of(self.history, "eval_loss")
        return values

    def training(self, metric: str) -> Series:
        """Values of the logging windows."""
        values = series_of(self.history, metric)
        if metric == "nll" and not values and self.objective == "nll":
            return series_of(self.history, "loss")
        return values


def series_of(history: Sequence[Mapping[str, Any]], metric: str) -> Series:
    """Values of a log's entries by optimizer step; the last one where a step was logged twice."""
    found = ((_number(entry.get("step")), _number(entry.get(metric))) for entry in history)
    return {step: value for step, value in found if step is not None and value is not None}


def _number(value: Any) -> float | None:
    try:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number else None
    except OverflowError:
        return None


@dataclass(frozen=True)
class RunFigures:
    """A line of the comparison.

    Args:
        name, objective, steps: the run's.
        held_out: whether figures are of an evaluation, else of the last logging window of training.
        held_out_tokens: that the last evaluation's figures are of; None where it was not logged.
        nll_first, nll_best, nll_last: None where it was not logged.
        last: the other metrics' last values.
        task: figures of the task.
    """

    name: str
    objective: str | None
    steps: int
    held_out: bool
    held_out_tokens: int | None
    nll_first: float | None
    nll_best: float | None
    nll_last: float | None
    last: dict[str, float]
    task: dict[str, float]


def load_run(path: str, *, option: str = "--compare") -> Run:
    """The run in a folder, or in a trainer_state.json.

    Raises:
        ValueError: there is none, or it is no log.
    """
    state = _state_of(Path(path), option)
    content = _json(state, option)
    history = content.get("log_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ValueError(
            f"{option} {path!r}: {state.name} has no log_history, as a trainer writes it."
        )
    results = _beside(state, RESULTS, option)
    named = _beside(state, OBJECTIVE, option) or results
    after = results.get("after")
    return Run(
        name=_name_of(state),
        path=state,
        objective=_objective_of(named, history),
        steps=_steps_of(content, state, option),
        history=history,
        task=_task_figures(after if isinstance(after, dict) else {}, history),
    )


def load_runs(paths: Sequence[str], *, option: str = "--compare") -> list[Run]:
    """Several runs, under names that differ."""
    runs = [load_run(path, option=option) for path in paths]
    names = _distinct([run.path for run in runs])
    return [
        Run(name, run.path, run.objective, run.steps, run.history, run.task)
        for name, run in zip(names, runs, strict=True)
    ]


def figures_of(run: Run) -> RunFigures:
    """A run in a line."""
    held_out = any(run.held_out(metric) for metric in COMPARED)
    of = run.held_out if held_out else run.training
    nll = of("nll")
    values = list(nll.values())
    tokens = list(run.held_out("scored_tokens").values())
    others = {metric: of(metric) for metric in COMPARED if metric != "nll"}
    return RunFigures(
        name=run.name,
        objective=run.objective,
        steps=run.steps,
        held_out=held_out,
        held_out_tokens=round(tokens[-1]) if tokens else None,
        nll_first=values[0] if values else None,
        nll_best=min((value for value in values if not math.isnan(value)), default=None),
        nll_last=values[-1] if values else None,
        last={metric: list(series.values())[-1] for metric, series in others.items() if series},
        task=run.task,
    )


def compared_metrics(runs: Sequence[Run]) -> list[str]:
    """Those of `COMPARED` that some run has logged."""
    return [
        metric
        for metric in COMPARED
        if any(run.held_out(metric) or run.training(metric) for run in runs)
    ]


def _task_figures(
    after: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Figures that are no metric of tokens: accuracies of answers, scores."""
    known = {*COMPARED, *_NOT_COMPARED}
    figures: dict[str, Any] = {}
    for entry in history:
        evaluated = {name[5:]: value for name, value in entry.items() if name.startswith("eval_")}
        # Of several evaluation sets each has the same metrics under its name, "eval_mine_loss".
        figures.update(
            {
                name: value
                for name, value in evaluated.items()
                if name not in known and not name.endswith(_NOT_COMPARED_ENDS)
            }
        )
    figures.update({name: value for name, value in after.items() if name not in known})
    numbers = {name: _number(value) for name, value in figures.items()}
    return {
        name: value for name, value in numbers.items() if value is not None and math.isfinite(value)
    }


def ends_before_its_run(run: Run) -> str | None:
    """What to say of a checkpoint's log that lacks the last evaluation; None for a log that has all."""
    evaluated = [
        entry["step"]
        for entry in run.history
        if isinstance(entry.get("step"), int) and any(name.startswith("eval_") for name in entry)
    ]
    whole = not run.path.parent.name.startswith("checkpoint-")
    if whole or not evaluated or max(evaluated) >= run.steps:
        return None
    return (
        f"{run.name}: the log of {run.path.parent.name} has no evaluation after step {max(evaluated)} of {run.steps}; a "
        "checkpoint is saved before its step is evaluated. trainer.save_state() after training writes the whole log."
    )


def _objective_of(record: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str | None:
    """The objective's name with its parameters, as objective.json or `scripts/train.py` names it.

    None where the log's end is another loss's: a plain trainer that has gone on in the folder names none.
    """
    loss_type, parameters = record.get("loss_type"), record.get("loss_kwargs")
    if not isinstance(loss_type, str):
        return None
    trained = [entry for entry in history if "loss" in entry]
    if trained and "objective_loss" not in trained[-1] and loss_type not in _TRLS_OWN:
        return None
    if not isinstance(parameters, dict) or not parameters:
        return loss_type
    listed = (
        f"{name}={value}" if (number := _number(value)) is None else f"{name}={number:g}"
        for name, value in parameters.items()
    )
    return f"{loss_type} ({', '.join(listed)})"


def _beside(state: Path, name: str, option: str) -> dict[str, Any]:
    """What a file in the run's folder holds; {} without one."""
    file = file_beside(state, name)
    return {} if file is None else _json(file, option)


def _steps_of(content: Mapping[str, Any], state: Path, option: str) -> int:
    steps = content.get("global_step") or 0
    if not isinstance(steps, int):
        raise ValueError(
            f"{option} {str(state)!r}: global_step is {steps!r}; it must be a whole number."
        )
    return steps


def _state_of(path: Path, option: str) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"{option} {str(path)!r} does not exist. Choices: a run's folder, or a {STATE}."
        )
    whole = path / STATE
    checkpoints = [
        folder
        for folder in path.glob("checkpoint-*")
        if _step_of(folder) >= 0 and (folder / STATE).is_file()
    ]
    newest = max(checkpoints, key=_step_of, default=None)
    if whole.is_file():
        # Older checkpoints are the log's run's, or left by one before it.
        if newest is None or (newest / STATE).stat().st_mtime <= whole.stat().st_mtime:
            return whole
        # A trainer that keeps no log in the folder may have gone on from where the log ends.
        has_gone_on = _step_of(newest) > _steps_of(_json(whole, option), whole, option)
        return newest / STATE if has_gone_on else whole
    if newest is None:
        lacks = f"{option} {str(path)!r} has no {STATE}, nor a checkpoint-N with one."
        runs = {state.parent for state in path.glob(f"*/{STATE}")}
        runs |= {
            state.parents[1]
            for state in path.glob(f"*/checkpoint-*/{STATE}")
            if _step_of(state.parent) >= 0
        }
        if runs:
            choices = ", ".join(sorted(map(str, runs))[:8])
            raise ValueError(f"{lacks} Choices: {choices}.")
        inside = ", ".join(sorted(each.name for each in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{lacks} It has: {inside}. Name the folder that a trainer wrote to (trainer.save_state() writes the file)."
        )
    return newest / STATE


def _step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 where there is none."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() and number.isascii() else -1


def _json(path: Path, option: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{option} {str(path)!r} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{option} {str(path)!r} is no {path.name} of a trainer's.")
    return content


def file_beside(state: Path, name: str) -> Path | None:
    """The file of that name in the log's folder, or in the run's."""
    files = (folder / name for folder in folders_of(state))
    return next((file for file in files if file.is_file()), None)


def folders_of(state: Path) -> list[Path]:
    """The log's folder; where that is a checkpoint's, the run's around it too, as the last."""
    folder = state.parent
    return [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]


def _name_of(state: Path) -> str:
    return _parts_of(state)[-1]


def _parts_of(state: Path) -> tuple[str, ...]:
    """The path of the run's folder; of a file that is not called as trainers do, its own without the suffix."""
    folder = folders_of(state.resolve())[-1]
    return folder.parts if state.name == STATE else (*folder.parts, state.stem)


def _distinct(states: Sequence[Path]) -> list[str]:
    """The shortest ends of the runs' paths that differ."""
    parts = [_parts_of(state) for state in states]
    longest = max((len(part) for part in parts), default=0)
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len({*names}) == len(names):
            return names
    # The same run twice.
    names = [part[-1] for part in parts]
    return [f"{name} ({index})" for index, name in enumerate(names, 1)]
