"""The file of answered questions: it goes on where it stopped, and is never mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="needs the extra `paper`")
from paper import record

HEADER: dict[str, Any] = {"suite": "math", "sampling": {"temperature": 1.0}, "pair": (1, 2)}
ROWS = [{"index": index, "answers": ["é\u2028\n\\boxed{1}"]} for index in range(3)]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    assert record.start(path, HEADER) == []
    record.append(path, ROWS[:2])
    assert record.start(path, HEADER) == ROWS[:2]
    record.append(path, ROWS[2:])
    header, rows = record.read(path)
    assert (header["sampling"], rows) == (HEADER["sampling"], ROWS)


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_last_line_that_was_cut_short_is_taken_off(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    record.start(path, HEADER)
    record.append(path, ROWS[:2])
    whole = path.read_bytes()
    record.append(path, ROWS[2:])
    path.write_bytes(path.read_bytes()[:-cut])
    assert record.start(path, HEADER) == ROWS[:2]
    assert path.read_bytes() == whole


def test_a_header_that_was_cut_short_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(HEADER)[:10])
    assert record.start(path, HEADER) == []
    assert record.read(path)[1] == []


def test_a_file_that_is_being_written_can_be_read(tmp_path: Path) -> None:
    """Without a last line that is not whole, and with the last of a question that is there twice."""
    path = tmp_path / "a.jsonl"
    record.start(path, HEADER)
    record.append(path, [*ROWS, {**ROWS[1], "answers": []}])
    with path.open("a") as file:
        file.write('{"index": 3, "answ')
    assert record.read(path)[1] == [ROWS[0], {**ROWS[1], "answers": []}, ROWS[2]]


@pytest.mark.parametrize("content", ["mine", "mine\nand mine", '{"suite": "math"}\n{"index": 0'])
def test_a_file_that_is_refused_keeps_its_last_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        record.start(path, HEADER)
    assert path.read_text() == content
    with pytest.raises(ValueError, match="is no file to write to: Is a directory"):
        record.start(tmp_path, HEADER)


def test_another_evaluations_file_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    record.start(path, HEADER)
    record.append(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"sampling was .*1\.0.* is .*0\.5.*another --output"):
        record.start(path, {**HEADER, "sampling": {"temperature": 0.5}})
    with pytest.raises(ValueError, match="versions was None"):
        record.start(path, {**HEADER, "versions": {"torch": "1"}})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        "",
        "text",
        '{"a": 1}\n',
        "[1]\n",
        "5\n",
        '"suite"\n',
        '{"suite": "math"}\n{\n',
        '{"suite": "math"}\n5\n',
    ],
)
def test_another_file_is_not_read(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"is not a file of scripts/paper/evaluate\.py"):
        record.read(path)
