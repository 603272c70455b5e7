"""The scripts that write chat messages in JSON lines: FigFont, and the data of the local Axolotl YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra `scripts`")

import make_figfont
import make_messages
from reasoning_gym.cognition import figlet_fonts

ROOT = Path(__file__).parents[2]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_figfont_does_not_depend_on_the_order_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: str) -> list[dict[str, Any]]:
        make_figfont.main(tmp_path / folder, train=8, test=4, seed=42)
        return rows(tmp_path / folder / "train.jsonl") + rows(tmp_path / folder / "test.jsonl")

    expected = write("first")
    monkeypatch.setattr(figlet_fonts, "OK_FONTS", figlet_fonts.OK_FONTS[::-1])
    assert write("second") == expected
    assert [len(row["messages"]) for row in expected] == [2] * 12
    for row in expected:
        question, answer = (message["content"] for message in row["messages"])
        assert 2 <= len(answer) <= 5
        assert answer.isupper()
        assert row["font"] in figlet_fonts.OK_FONTS
        assert len(question.splitlines()) > 3


def test_figfonts_test_comes_after_its_training_questions(tmp_path: Path) -> None:
    make_figfont.main(tmp_path, train=3, test=2, seed=42)
    dataset = make_figfont.make_dataset(5, 42)
    answers = [dataset[index]["answer"] for index in range(5)]
    written = rows(tmp_path / "train.jsonl") + rows(tmp_path / "test.jsonl")
    assert [row["messages"][1]["content"] for row in written] == answers


def test_the_shipped_data_is_what_the_script_writes(tmp_path: Path) -> None:
    make_messages.main("spell_backward", tmp_path, train=1500, held_out=128, seed=0)
    names = ("spell_backward_train.jsonl", "spell_backward_held_out.jsonl")
    for name in names:
        shipped = ROOT / "axolotl_configs/data" / name
        assert (tmp_path / name).read_text() == shipped.read_text()
    train, held_out = (
        {row["messages"][0]["content"] for row in rows(tmp_path / name)} for name in names
    )
    assert len(train) == 1500
    assert not train & held_out
