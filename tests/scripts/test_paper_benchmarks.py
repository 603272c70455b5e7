"""Benchmarks out of files with the columns that they have on the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="needs the extra `paper`")
from paper.benchmarks import MATH, load_questions
from paper.experiments import BOXED

# One row each, with the columns of the data set.
MATH_ROWS: dict[str, dict[str, Any]] = {
    "minerva": {"question": "How wide, in cm?", "answer": "1.6"},
    "olympiadbench": {"id": 1606, "question": "How many moves?", "solution": ["In 2."], "final_answer": ["2"],
                      "context": None, "is_multiple_answer": False},
    "aime24": {"id": 60, "problem": "How many minutes?", "solution": "\\framebox{204}", "answer": "204",
               "year": "2024"},
    "amc23": {"id": 0, "answer": 27.0, "url": "there", "question": "How many miles?"},
    "math500": {"problem": "In polar form?", "solution": "It is $\\boxed{(3, 0)}$.", "answer": "(3, 0)",
                "subject": "Precalculus", "level": 2, "unique_id": "test/precalculus/807.json"},
}  # fmt: skip
# As the evaluation of m1 has it: benchmarks of questions.
MEDICAL = {
    "MedQA_USLME_test": [
        {
            "question": "Which vitamin?",
            "options": {"A": "C", "B": "D"},
            "answer": "C",
            "answer_idx": "A",
        }
    ],
    "PubMedQA_test": [
        {"question": f"Is it {n}?", "options": {"A": "yes", "B": "no", "C": "maybe"}, "answer": "no", "answer_idx": "B"}
        for n in range(3)
    ],
}  # fmt: skip


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "asked", "reference"),
    [
        ("minerva", "How wide, in cm?", "1.6"),
        ("olympiadbench", "How many moves?", "2"),
        ("aime24", "How many minutes?", "204"),
        ("amc23", "How many miles?", "27.0"),
        ("math500", "In polar form?", "(3, 0)"),
    ],
)
def test_the_math_benchmarks(name: str, asked: str, reference: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [MATH_ROWS[name]])
    (question,) = load_questions("math", {name: file}, [], None)
    assert (question.benchmark, question.index) == (name, 0)
    assert (question.text, question.reference) == (asked + BOXED, reference)


def test_there_is_a_row_for_each_math_benchmark() -> None:
    assert MATH_ROWS.keys() == MATH.keys()


def test_answers_out_of_a_solution_where_there_is_no_other_column(tmp_path: Path) -> None:
    """As Minerva's are in the Qwen2.5-Math evaluation, which the authors use."""
    row = {"problem": "How wide?", "solution": "s = \\boxed{1.6} cm", "type": "Astronomy", "idx": 0}
    file = write(tmp_path / "a.jsonl", [row])
    (question,) = load_questions("math", {"minerva": file}, [], None)
    assert question.reference == "s = \\boxed{1.6} cm"


def test_several_files_come_in_the_order_of_the_table(tmp_path: Path) -> None:
    files = {
        name: write(tmp_path / f"{name}.jsonl", [MATH_ROWS[name]] * 2)
        for name in ("math500", "minerva")
    }
    questions = load_questions("math", files, [], limit=1)
    assert [question.benchmark for question in questions] == ["minerva", "math500"]


def test_the_medical_benchmarks_are_one_file(tmp_path: Path) -> None:
    file = write(tmp_path / "m1_eval_data.json", MEDICAL)
    questions = load_questions("medical", {"": file}, [], None)
    assert [(q.benchmark, q.index) for q in questions] == [
        ("MedQA_USLME_test", 0),
        *(("PubMedQA_test", n) for n in range(3)),
    ]
    assert questions[0].text == "Which vitamin?\nA. C\nB. D" + BOXED
    assert (questions[0].reference, questions[0].options) == ("A", {"A": "C", "B": "D"})
    chosen = load_questions("medical", {"": file}, ["PubMedQA_test"], limit=2)
    assert [q.index for q in chosen] == [0, 1]


def test_a_medical_benchmark_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", MEDICAL["PubMedQA_test"])
    assert {q.benchmark for q in load_questions("medical", {"PubMedQA": file}, [], None)} == {
        "PubMedQA"
    }
    assert {q.benchmark for q in load_questions("medical", {"": file}, [], None)} == {"a"}


def test_texts_with_separators_of_lines_stay_whole(tmp_path: Path) -> None:
    row = {**MATH_ROWS["aime24"], "problem": "a\u2028b\x1cc"}
    file = write(tmp_path / "a.jsonl", [row])
    (question,) = load_questions("math", {"aime24": file}, [], None)
    assert question.text.startswith("a\u2028b\x1cc")


@pytest.mark.parametrize(
    ("suite", "name", "content", "chosen", "message"),
    [
        ("math", "aime24", [{"text": "?"}], [], "aime24 needs the column problem or question, and has text."),
        ("math", "aime24", [{"problem": "?"}], [], "aime24 needs the column answer or final_answer or solution, and has"),
        ("math", "aime", [], [], "NAME one of minerva, olympiadbench, aime24, amc23, math500; not 'aime'."),
        ("math", "aime24", [MATH_ROWS["aime24"]], ["aime25"], "'aime25' is not in the suite math. Choices: minerva, olymp"),
        ("math", "aime24", [], [], "The suite math has no questions"),
        ("medical", "x", [{"question": "?", "options": {"A": "1"}}], [], "x needs the column answer_idx, and has"),
        ("medical", "x", [{"question": "?", "options": ["1"], "answer_idx": "A"}], [],
         "x, row 0: options must be an object of texts by letter"),
        ("medical", "x", [{"question": "?", "options": {"A": "1"}, "answer_idx": "B"}], [], "and 'B'."),
        ("figfont", "", [{"text": "?"}], [], "figfont needs the column messages, and has text."),
        ("figfont", "", [{"messages": "?"}], [], "figfont, row 0: messages must be a list of roles and contents; not '?'"),
        ("figfont", "", [{"messages": [{"role": "user"}]}], [], "figfont, row 0: messages must be a list of roles"),
        ("math", "aime24", [{"problem": 1, "answer": 2}], [], "aime24, row 0: 1 must be a text."),
        ("medical", "x", [{"question": 1, "options": {"A": "1"}, "answer_idx": "A"}], [], "x, row 0: 1 must be a text."),
        ("medical", "x", [{"question": "?", "options": {"A": "1"}, "answer_idx": ["A"]}], [], "and ['A']."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    suite: str, name: str, content: Any, chosen: list[str], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_questions(suite, {name: file}, chosen, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [("5", "neither rows nor an object of them, but 5"), ('{"x": 5}', "x has no rows, but 5")],
)
def test_files_of_something_else(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_questions("medical", {"": tmp_path / "a.json"}, [], None)


def test_files_that_are_no_json_and_hubs_out_of_reach_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.jsonl"
    file.write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load_questions("math", {"aime24": file}, [], None)
    for suite in ("math", "medical"):
        with pytest.raises(ValueError, match=r"cannot be loaded from the hub: .* with --data"):
            load_questions(suite, {}, [], None)
    with pytest.raises(ValueError, match=r"prepare\.py figfont writes it"):
        load_questions("figfont", {}, [], None)
