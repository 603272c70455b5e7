"""Writes an experiment's training data as chat messages in JSON lines, one conversation a line.

    python scripts/paper/prepare.py math          # data/math/train.jsonl: 67,000 problems of NuminaMath-CoT
    python scripts/paper/prepare.py math --data gaotang/numina-cot-subset-67k --rows 0    # the authors' own subset
    python scripts/paper/prepare.py medical       # data/medical/train.jsonl: m23k without its reasoning
    python scripts/paper/prepare.py figfont       # data/figfont/train.jsonl and test.jsonl

--data also takes a file (.jsonl, .json, .csv, .parquet) or a folder with the same columns. The same data, rows and seed
give the same file.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import process_setup  # noqa: F401

# isort: split
import json
import random
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from datasets import Dataset
from report import console

from deft_plugin.report.data import load_splits, split_of
from paper.experiments import EXPERIMENTS, training_file

# By experiment: the data set on the hub, and the columns of question and answer. A dot is a field of a column.
SOURCES = {
    "math": "AI-MO/NuminaMath-CoT",
    "medical": "UCSC-VLAA/m23k-tokenized",
}
COLUMNS = {
    # The second are those of the authors' subset.
    "math": (("problem", "solution"), ("extra_info.question", "extra_info.answer")),
    # Its `reasoning` is what the paper leaves out.
    "medical": (("prompt", "distilled_answer_string"),),
}
MATH_ROWS = 67_000


def load_rows(name: str) -> Dataset:
    """The training split of a data set on the hub, of a folder or of a file.

    Raises:
        ValueError: it cannot be loaded.
    """
    return split_of(load_splits(name), "train", name)


def choose_columns(experiment: str, rows: Dataset) -> tuple[str, str]:
    """The columns of question and answer, of those that the experiment's data is known to have.

    Raises:
        ValueError: the data has none of them; the message names what it has.
    """
    choices = COLUMNS[experiment]
    for question, answer in choices:
        # Some rows may have no question or no answer; they are left out.
        for row in rows.take(min(len(rows), 1000)):
            if _field(row, question) is not None and _field(row, answer) is not None:
                return question, answer
    known = "; or ".join(" and ".join(pair) for pair in choices)
    raise ValueError(
        f"The {experiment} data needs the columns {known}, and has {', '.join(rows.column_names) or 'no rows'}."
    )


def _field(row: dict[str, Any], path: str) -> Any:
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def draw(count: int, rows: int, seed: int) -> list[int]:
    """`rows` of `count` indices, in ascending order; all of them for 0.

    Raises:
        ValueError: there are not so many.
    """
    if rows > count:
        raise ValueError(f"--rows {rows} is more than the {count} that there are.")
    return sorted(random.Random(seed).sample(range(count), rows)) if rows else list(range(count))


def conversations(
    rows: Dataset, columns: tuple[str, str], instruction: str
) -> Iterator[dict[str, Any]]:
    """One conversation for each row that has a question and an answer."""
    for row in rows:
        question, answer = (str(_field(row, path) or "").strip() for path in columns)
        if question and answer:
            yield {
                "messages": [
                    {"role": "user", "content": question + instruction},
                    {"role": "assistant", "content": answer},
                ]
            }


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Write the rows, so that the file is there whole or not at all, and return their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    partial.replace(path)
    return count


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _prepare(experiment: str, data: str, rows: int, seed: int, output: Path) -> None:
    try:
        loaded = load_rows(data)
        columns = choose_columns(experiment, loaded)
        drawn = loaded.select(draw(len(loaded), rows, seed))
    except ValueError as error:
        raise typer.BadParameter(" ".join(str(error).split())) from None
    path = output / "train.jsonl"
    written = write_lines(path, conversations(drawn, columns, EXPERIMENTS[experiment].instruction))
    console.print(
        f"{path}: {written} conversations from {data} ({len(loaded)} rows, columns {' and '.join(columns)}; "
        f"{len(drawn)} drawn with seed {seed}, {len(drawn) - written} without question or answer left out).",
        soft_wrap=True,
    )


@app.command()
def math(
    data: Annotated[str, typer.Option(help="Name on the hub, file or folder.")] = SOURCES["math"],
    rows: Annotated[int, typer.Option(min=0, help="Rows to draw; 0 for all.")] = MATH_ROWS,
    seed: Annotated[int, typer.Option(help="Draws the rows.")] = 42,
    output: Annotated[Path, typer.Option(help="Folder.")] = training_file("math").parent,
) -> None:
    """NuminaMath-CoT: problems, and solutions with the answer in a box."""
    _prepare("math", data, rows, seed, output)


@app.command()
def medical(
    data: Annotated[str, typer.Option(help="Name on the hub, file or folder.")] = SOURCES[
        "medical"
    ],
    rows: Annotated[int, typer.Option(min=0, help="Rows to draw; 0 for all.")] = 0,
    seed: Annotated[int, typer.Option(help="Draws the rows.")] = 42,
    output: Annotated[Path, typer.Option(help="Folder.")] = training_file("medical").parent,
) -> None:
    """m23k: multiple-choice questions, and answers without the reasoning before them."""
    _prepare("medical", data, rows, seed, output)


@app.command()
def figfont(
    train: Annotated[int, typer.Option(min=1, help="Training questions.")] = 40_000,
    test: Annotated[int, typer.Option(min=1, help="Test questions, after those.")] = 5_000,
    seed: Annotated[int, typer.Option(help="Seed of the task.")] = 42,
    output: Annotated[Path, typer.Option(help="Folder.")] = training_file("figfont").parent,
) -> None:
    """Words in ASCII-art fonts, as `scripts/make_figfont.py` writes them."""
    import make_figfont  # needs reasoning_gym, which the others do not

    make_figfont.main(output, train, test, seed)
    console.print(f"{output}: {train} training and {test} test questions.")


if __name__ == "__main__":
    app()
