"""Data sets by name: formats, splits, columns, and what is said about a name that does not exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

pytest.importorskip("typer", reason="needs the extra `scripts`")
from data import load_data

QUESTION = [{"role": "user", "content": "2 + 2"}]
ANSWER = [{"role": "assistant", "content": "4"}]
SHAREGPT = [{"from": "user", "value": "2 + 2"}, {"from": "assistant", "value": "4"}]


def write(path: Path, row: dict[str, Any], count: int = 20) -> str:
    """A .jsonl file of `count` rows that differ in the column `number`."""
    lines = (json.dumps({**row, "number": str(number)}) + "\n" for number in range(count))
    path.write_text("".join(lines))
    return str(path)


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"prompt": "2 + 2", "completion": " 4"}, None, {"prompt": "2 + 2", "completion": " 4"}),
        ({"prompt": QUESTION, "completion": ANSWER}, None, {"prompt": QUESTION, "completion": ANSWER}),
        ({"messages": QUESTION + ANSWER, "prompt": "2 + 2"}, None, {"messages": QUESTION + ANSWER}),
        ({"conversations": SHAREGPT}, None, {"messages": QUESTION + ANSWER}),
        ({"text": "two", "url": "there"}, None, {"text": "two"}),
        ({"question": "2", "answer": "4"}, "question,answer", {"prompt": "2", "completion": "4"}),
        ({"prompt": "2", "answer": "4"}, "prompt,answer", {"prompt": "2", "completion": "4"}),
        ({"content": "two", "text": "other"}, "content", {"text": "two"}),
        ({"chat": QUESTION + ANSWER}, "chat", {"messages": QUESTION + ANSWER}),
    ],
)  # fmt: skip
def test_a_file_of_any_of_trl_s_formats_is_loaded_without_other_columns(
    row: dict[str, Any], columns: str | None, expected: dict[str, Any], tmp_path: Path
) -> None:
    name = write(tmp_path / "rows.jsonl", row)
    data = load_data(name, train_rows=100, held_out_rows=100, seed=0, columns=columns)
    assert data["train"][0] == data["held_out"][0] == expected


def test_without_a_held_out_split_a_tenth_is_cut_from_the_training_rows(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", {})
    data = load_data(name, train_rows=100, held_out_rows=100, seed=0, columns="number")
    train, held_out = data["train"]["text"], data["held_out"]["text"]
    assert (len(train), len(held_out)) == (18, 2)
    assert {*train, *held_out} == set(map(str, range(20)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("train", "test")),
        ({"held_out_split": "validation"}, ("train", "validation")),
        ({"train_split": "test"}, ("test", "validation")),
    ],
)
def test_splits_of_a_saved_folder_are_chosen_by_name(
    options: dict[str, str], expected: tuple[str, str], tmp_path: Path
) -> None:
    splits = ("train", "validation", "test")
    saved = DatasetDict({split: Dataset.from_dict({"text": [split] * 5}) for split in splits})
    saved.save_to_disk(str(tmp_path))
    data = load_data(str(tmp_path), train_rows=4, held_out_rows=3, seed=0, **options)
    assert data["train"]["text"][:] == [expected[0]] * 4
    assert data["held_out"]["text"][:] == [expected[1]] * 3


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": ""}, {"train_split": "sft"}, r"--train-split 'sft' is not in .*Choices: train\."),
        ({"text": ""}, {"held_out_split": "dev"}, r"--held-out-split 'dev' .*Choices: train\."),
        ({"text": ""}, {"columns": "texts"}, r"--columns 'texts' .*: text, number\."),
        ({"text": ""}, {"columns": "text,number,text"}, r"one or two of .*: text, number\."),
        (
            {"question": ""},
            {},
            r"columns question, number.*prompt, completion; messages;.*--columns",
        ),
    ],
)
def test_a_wrong_split_column_or_configuration_is_answered_with_the_choices(
    row: dict[str, Any], options: dict[str, str], message: str, tmp_path: Path
) -> None:
    name = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(ValueError, match=message):
        load_data(name, train_rows=1, held_out_rows=1, seed=0, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"config": "main"},
        {"columns": "prompt"},
        {"train_split": "test"},
        {"held_out_split": "test"},
    ],
)
def test_a_choice_that_a_task_does_not_have_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="'spell_backward' is a task, which has no configurations"):
        load_data("spell_backward", train_rows=1, held_out_rows=1, seed=0, **options)


@pytest.mark.parametrize("name", ["spell_backwards", "there/is/none", "none.jsonl", "broken.json"])
def test_an_unknown_name_is_answered_with_the_choices(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text('{"text": ')
    with pytest.raises(ValueError, match=rf"--dataset '{name}' cannot .*spell_backward, .*\.jsonl"):
        load_data(name, train_rows=1, held_out_rows=1, seed=0)


def test_configurations_of_a_data_set_are_chosen_by_name(tmp_path: Path) -> None:
    for config in ("main", "socratic"):
        write(tmp_path / f"{config}.jsonl", {"text": config})
    files = "".join(
        f"- {{config_name: {c}, data_files: {c}.jsonl}}\n" for c in ("main", "socratic")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    data = load_data(str(tmp_path), 5, 5, seed=0, config="socratic")
    assert data["train"][0] == {"text": "socratic"}
    for wrong in (None, "test"):
        with pytest.raises(ValueError, match=r"'main', 'socratic'"):
            load_data(str(tmp_path), 5, 5, seed=0, config=wrong)
