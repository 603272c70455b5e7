"""The study's data: what is asked, in three splits, and how an answer is made wrong.

Small scale, for the shipped base model of 3.5 million parameters over bytes:

    string_insertion  a task it was trained on and does well
    letter_counting   one it does half of
    spell_backward    one it has never seen, in a form it knows: it is confident, and wrong
    figfont           words in ASCII art, which it has never seen either (the paper's task)

Real scale, for SmolLM2-135M-Instruct: `medmcqa` (the options are in the question), `asdiv` (the answer alone, so that its form can
be known and its number has to be computed) and `figfont`. Which regime of the paper each is, is measured: the mean
focus before training.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from make_figfont import make_dataset
from real_data import get_real_data
from tasks import FINE_TUNING_TASKS, PRETRAINING_TASKS, make_splits

Splits = Mapping[str, list["Row"]]

# Longer questions are left out, since they would be most of the compute: bytes of art, characters of text.
LONGEST_ART = 240
LONGEST_TEXT = 300
HELD_OUT = {"validation": 128, "test": 256}
# Seeds questions, and is none of the runs' seeds.
DATA_SEED = 1000


@dataclass(frozen=True)
class Row:
    """A question and its reference answer."""

    question: str
    answer: str

    @property
    def messages(self) -> dict[str, list[dict[str, str]]]:
        """As TRL takes it."""
        return {
            "prompt": [{"role": "user", "content": self.question}],
            "completion": [{"role": "assistant", "content": self.answer}],
        }


@dataclass(frozen=True)
class StudyData:
    """One data set of the study.

    Attributes:
        name: its name.
        score: the task's own figure: "exact" (share of rows whose greedy answer is the reference, token by token), "tokens"
            (share of the reference's tokens that are the model's first choice), "first_token" (the same of each row's first
            token, the letter of an option), "jaro_winkler" (of the greedy answer, as in the paper).
        load: its splits train, validation and test.
        wrong_answer: an answer that is wrong for the first row, made with the help of the second.
        train_rows: rows that a run trains on, where that is more than its scale's.
    """

    name: str
    score: str
    load: Callable[[], Splits]
    wrong_answer: Callable[[Row, Row], str]
    train_rows: int | None = None


def training_rows(data: StudyData, count: int, corrupted: float, seed: int) -> list[Row]:
    """`count` rows drawn by `seed`, of which a share `corrupted` has wrong answers."""
    draw = random.Random(seed)
    pool = list(data.load()["train"])
    rows = draw.sample(pool, min(count, len(pool)))
    for index in draw.sample(range(len(rows)), round(corrupted * len(rows))):
        row = rows[index]
        answers = (data.wrong_answer(row, other) for other in draw.sample(pool, len(pool)))
        wrong = next(answer for answer in answers if answer != row.answer)
        rows[index] = replace(row, answer=wrong)
    return rows


def answer_of_another(row: Row, other: Row) -> str:
    """The right answer to another question."""
    return other.answer


def another_number(row: Row, other: Row) -> str:
    """The row's answer with the number of another, or another's answer where there is no number."""
    number = re.search(r"\d[\d,.]*", other.answer)
    if number is None or re.search(r"\d", row.answer) is None:
        return other.answer
    return re.sub(r"\d[\d,.]*", number.group(), row.answer, count=1)


def another_option(row: Row, other: Row) -> str:
    """An option of the question that is not the answer; which one, the other row says."""
    options = re.findall(r"^[A-E]\. .*$", row.question, flags=re.MULTILINE)
    wrong = [option for option in options if option != row.answer]
    return wrong[len(other.question) % len(wrong)]


@cache
def _task(name: str) -> Splits:
    task = {**PRETRAINING_TASKS, **FINE_TUNING_TASKS}[name]
    splits = make_splits(task, 4096, sum(HELD_OUT.values()), DATA_SEED)
    held_out, train = ([row_of(row) for row in splits[name]] for name in ("held_out", "train"))
    count = HELD_OUT["validation"]
    return {"train": train, "validation": held_out[:count], "test": held_out[count:]}


@cache
def _figfont(art_alone: bool) -> Splits:
    """The paper's questions in its order, without large art; `art_alone` leaves the sentence before it out."""
    dataset = make_dataset(45_000, 42)
    sizes = {"test": HELD_OUT["test"], "validation": HELD_OUT["validation"], "train": 4096}
    splits: dict[str, list[Row]] = {}
    index = 0
    for split, size in sizes.items():
        rows: list[Row] = []
        while len(rows) < size:
            entry = dataset[index]
            index += 1
            before, _, art = entry["question"].partition("\n\n")
            if len(art.encode()) <= LONGEST_ART:
                rows.append(Row(art if art_alone else f"{before}\n\n{art}", entry["answer"]))
        splits[split] = rows
    return splits


@cache
def _file(name: str) -> Splits:
    folder = get_real_data(name)
    return {
        split: _read(folder / f"{split}.jsonl")[: HELD_OUT.get(split)]
        for split in ("train", *HELD_OUT)
    }


def _read(path: Path) -> list[Row]:
    rows = [row_of(json.loads(line)) for line in path.read_text().splitlines()]
    return [row for row in rows if len(row.question) <= LONGEST_TEXT]


def row_of(row: Mapping[str, Any]) -> Row:
    """A row of TRL's format, with one message each as prompt and completion."""
    return Row(row["prompt"][0]["content"], row["completion"][0]["content"])


def _small(name: str) -> StudyData:
    return StudyData(name, "exact", partial(_task, name), answer_of_another)


SMALL = {
    **{name: _small(name) for name in ("string_insertion", "letter_counting")},
    # A fifth of them teaches the form of an answer alone.
    "spell_backward": replace(_small("spell_backward"), train_rows=3072),
    "figfont": StudyData("figfont", "jaro_winkler", partial(_figfont, True), answer_of_another),
}
REAL = {
    "medmcqa": StudyData("medmcqa", "first_token", partial(_file, "medmcqa"), another_option),
    "asdiv": StudyData("asdiv", "tokens", partial(_file, "asdiv"), another_number),
    "figfont": StudyData("figfont", "jaro_winkler", partial(_figfont, False), answer_of_another),
}
