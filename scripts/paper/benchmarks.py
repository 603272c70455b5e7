"""The benchmarks' questions, from the hub or from files of the same columns."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paper.experiments import EXPERIMENTS, training_file

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        benchmark: its name in the table.
        index: its place in the benchmark.
        text: what a model is asked.
        reference: the right answer: LaTeX, a letter, or a word.
        options: the texts of a multiple choice by letter.
    """

    benchmark: str
    index: int
    text: str
    reference: str
    options: Mapping[str, str] = field(default_factory=dict)


# By name in the table: data set on the hub, configuration and split. The paper's average is over these five.
MATH = {
    "minerva": ("math-ai/minervamath", None, "test"),
    "olympiadbench": ("math-ai/olympiadbench", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "amc23": ("math-ai/amc23", None, "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
}
# Where each has one of a row, in this order: the data sets name their columns differently.
MATH_QUESTION = ("problem", "question")
MATH_ANSWER = ("answer", "final_answer", "solution")

# One JSON file with all of the medical benchmarks by name, which the authors' evaluation reads.
MEDICAL = ("UCSC-VLAA/m1_eval_data", "m1_eval_data.json")
MEDICAL_COLUMNS = ("question", "options", "answer_idx")

FIGFONT = training_file("figfont").with_name("test.jsonl")


def load_questions(
    suite: str, files: Mapping[str, Path], chosen: Sequence[str], limit: int | None
) -> list[Question]:
    """A suite's questions, benchmark after benchmark.

    Args:
        suite: of `EXPERIMENTS`.
        files: JSON or JSON lines by benchmark, in place of the hub; "" for one file of the whole suite.
        chosen: benchmarks to take; empty for all.
        limit: most questions of each.

    Raises:
        ValueError: data, columns or benchmarks that are not there.
    """
    load = {"math": _load_math, "medical": _load_medical, "figfont": _load_figfont}[suite]
    tables = load(files, chosen)
    missing = [name for name in chosen if name not in tables]
    if missing:
        raise ValueError(
            f"--benchmark {missing[0]!r} is not in the suite {suite}. Choices: {', '.join(tables)}."
        )
    read = {"math": _math_question, "medical": _medical_question, "figfont": _figfont_question}[
        suite
    ]
    questions = [
        read(name, index, row)
        for name, rows in tables.items()
        if not chosen or name in chosen
        for index, row in enumerate(rows)
        if limit is None or index < limit
    ]
    if not questions:
        raise ValueError(
            f"The suite {suite} has no questions in {', '.join(map(str, files.values()))}."
        )
    return questions


def read_rows(path: Path) -> Any:
    """The rows of a JSON or JSON lines file, or the object that a JSON file holds.

    Raises:
        ValueError: it is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
        # Not str.splitlines, which also splits at separators inside of texts.
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--data {path} cannot be read as JSON: {error}") from None
    if not isinstance(content, list | dict):
        raise ValueError(f"--data {path} has neither rows nor an object of them, but {content!r}.")
    return content


def _load_math(files: Mapping[str, Path], chosen: Sequence[str]) -> dict[str, Rows]:
    unknown = [name for name in files if name not in MATH]
    if unknown:
        raise ValueError(
            f"--data needs NAME=FILE for the suite math, NAME one of {', '.join(MATH)}; not {unknown[0]!r}."
        )
    unknown = [name for name in chosen if name not in MATH]
    if unknown:
        raise ValueError(
            f"--benchmark {unknown[0]!r} is not in the suite math. Choices: {', '.join(MATH)}."
        )
    names = chosen or list(files) or list(MATH)
    return {
        name: read_rows(files[name]) if name in files else _from_hub(*MATH[name])
        for name in MATH
        if name in names
    }


def _load_medical(files: Mapping[str, Path], chosen: Sequence[str]) -> dict[str, Rows]:
    tables: dict[str, Rows] = {}
    for name, path in files.items():
        rows = read_rows(path)
        # As the file on the hub: an object of benchmarks.
        found = rows if isinstance(rows, dict) else {name or path.stem: rows}
        for benchmark, table in found.items():
            if not isinstance(table, list):
                raise ValueError(
                    f"--data {path}: {benchmark} has no rows, but {textwrap.shorten(repr(table), 100)}."
                )
        tables |= found
    return tables or json.loads(Path(_file_from_hub(*MEDICAL)).read_text(encoding="utf-8"))


def _load_figfont(files: Mapping[str, Path], chosen: Sequence[str]) -> dict[str, Rows]:
    path = next(iter(files.values()), FIGFONT)
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: scripts/paper/prepare.py figfont writes it, or name one with --data."
        )
    return {"figfont": read_rows(path)}


def _from_hub(name: str, configuration: str | None, split: str) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows: Rows = load_dataset(name, configuration, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(_unreachable(name, error)) from None
    return rows


def _file_from_hub(name: str, file: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return hf_hub_download(name, file, repo_type="dataset")
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(_unreachable(name, error)) from None


def _unreachable(name: str, error: Exception) -> str:
    reason = textwrap.shorten(str(error), 200).rstrip(".")
    return f"{name} cannot be loaded from the hub: {reason}. Files of the same columns can be named with --data."


def _math_question(name: str, index: int, row: Mapping[str, Any]) -> Question:
    question = _text(_first(row, MATH_QUESTION, name), name, index)
    answer = _first(row, MATH_ANSWER, name)
    # OlympiadBench has lists, nearly all of one answer.
    reference = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
    return Question(name, index, question + EXPERIMENTS["math"].instruction, reference)


def _medical_question(name: str, index: int, row: Mapping[str, Any]) -> Question:
    question, options, letter = (_first(row, (column,), name) for column in MEDICAL_COLUMNS)
    question = _text(question, name, index)
    if not isinstance(options, dict) or str(letter) not in options:
        raise ValueError(
            f"{name}, row {index}: options must be an object of texts by letter, and answer_idx one of its letters; "
            f"not {textwrap.shorten(repr(options), 100)} and {letter!r}."
        )
    lines = [question, *(f"{option}. {text}" for option, text in options.items())]
    text = "\n".join(lines) + EXPERIMENTS["medical"].instruction
    return Question(name, index, text, letter, options)


def _figfont_question(name: str, index: int, row: Mapping[str, Any]) -> Question:
    messages = _first(row, ("messages",), name)
    try:
        asked, answer = messages[0]["content"], messages[-1]["content"]
    except (TypeError, KeyError):
        raise ValueError(
            f"{name}, row {index}: messages must be a list of roles and contents; not "
            f"{textwrap.shorten(repr(messages), 100)}."
        ) from None
    text = _text(asked, name, index) + EXPERIMENTS["figfont"].instruction
    return Question(name, index, text, _text(answer, name, index))


def _text(value: Any, name: str, index: int) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{name}, row {index}: {textwrap.shorten(repr(value), 100)} must be a text."
        )
    return value


def _first(row: Mapping[str, Any], columns: Sequence[str], name: str) -> Any:
    for column in columns:
        value = row.get(column) if isinstance(row, Mapping) else None
        if value is not None and value != []:
            return value
    has = ", ".join(row) if isinstance(row, Mapping) else repr(row)
    raise ValueError(f"{name} needs the column {' or '.join(columns)}, and has {has}.")
