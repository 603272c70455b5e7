"""The study's results files: a line a run, added when it is finished, whole or not at all."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import typer

# The "objective" of the model before training.
BASE = "base"


@dataclass(frozen=True)
class Run:
    """What makes a run the run it is.

    Attributes:
        data: the data set's name.
        corrupted: share of the training rows that have wrong answers.
        objective: a `loss_type`, "nll" being computed as the others are, or `BASE`, which trains nothing.
        learning_rate: peak, after a tenth of the steps; then cosine to 0.
        seed: draws the training rows, which of them are corrupted, their order, and an adapter's beginning.
        split: "validation" for the choice of the learning rate, or "test".
    """

    data: str
    corrupted: float
    objective: str
    learning_rate: float
    seed: int
    split: str


# The columns that make a run the run it is.
KEY = tuple(field.name for field in fields(Run))

Results = dict[Run, dict[str, str]]


def read_results(path: Path) -> Results:
    """The results file's lines, by run. A last line that was cut short is taken off the file.

    Raises:
        typer.BadParameter: it is another file.
    """
    if not path.exists():
        return {}
    types = {field.name: {"float": float, "int": int}.get(field.type, str) for field in fields(Run)}
    try:
        results = {
            Run(**{name: cast(line[name]) for name, cast in types.items()}): line
            for line in read_lines(path)
        }
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"--output: {path} is there and is no results file of a study: {error}"
        ) from None
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return results


def append_result(path: Path, run: Run, figures: dict[str, Any]) -> None:
    """Add a line, and the header where it is the first."""
    line = asdict(run) | {
        name: f"{value:.6g}" if isinstance(value, float) else value
        for name, value in figures.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(line))
        if is_new:
            writer.writeheader()
        writer.writerow(line)


def read_lines(path: Path) -> list[dict[str, str]]:
    """A results file's lines, the last one of a run that is there twice; without a last line that a kill has cut short.

    Raises:
        ValueError: it is another file, or a line in it is damaged.
    """
    with path.open(newline="") as file:
        content = file.read()
    whole = content[: content.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    if content and not {*KEY} <= {*(reader.fieldnames or ())}:
        raise ValueError(f"its first line does not have {', '.join(KEY)}.")
    lines = {}
    for line in reader:
        if None in line or None in line.values():
            raise ValueError(f"line {reader.line_num} has not as many columns as the first.")
        lines[tuple(line[name] for name in KEY)] = line
    return list(lines.values())
