"""The paper's training data out of files with the columns of the data sets on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from typer.testing import CliRunner, Result

pytest.importorskip("typer", reason="needs the extra `paper`")
from paper import prepare
from paper.experiments import BOXED


def run(*options: str) -> Result:
    return CliRunner().invoke(prepare.app, list(options), catch_exceptions=False)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numina(count: int) -> list[dict[str, Any]]:
    """Rows with the columns of AI-MO/NuminaMath-CoT."""
    return [
        {
            "source": "cn_k12",
            "problem": f"Compute ${number}+1$.",
            "solution": f"It is $\\boxed{{{number + 1}}}$.",
            "messages": [{"role": "user", "content": "another"}],
        }
        for number in range(count)
    ]


def test_math_draws_rows_of_numinamath_in_their_order(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", numina(50))
    result = run("math", "--data", data, "--rows", "20", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    written = lines(tmp_path / "train.jsonl")
    assert len(written) == 20
    assert "20 conversations" in result.output
    assert "(50 rows, columns problem and solution; 20 drawn with seed 42, 0" in result.output
    numbers = []
    for row in written:
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        text = question["content"].removesuffix(BOXED)
        numbers.append(int(text.removeprefix("Compute $").removesuffix("+1$.")))
        assert answer["content"] == f"It is $\\boxed{{{numbers[-1] + 1}}}$."
    assert numbers == sorted(set(numbers))
    assert numbers != list(range(20))


def test_the_seed_alone_decides_the_rows(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", numina(50))

    def written(seed: int, folder: str) -> bytes:
        options = ("--rows", "20", "--seed", str(seed), "--output", str(tmp_path / folder))
        assert run("math", "--data", data, *options).exit_code == 0
        return (tmp_path / folder / "train.jsonl").read_bytes()

    assert written(1, "a") == written(1, "b") != written(2, "c")


def test_math_takes_the_columns_of_the_authors_subset(tmp_path: Path) -> None:
    """Which their training commands name: question and answer in the column extra_info."""
    rows = [
        {
            "data_source": "AI-MO/NuminaMath-CoT-processed",
            "prompt": [{"role": "user", "content": "with an instruction"}],
            "extra_info": {"question": f"{n}?", "answer": f"\\boxed{{{n}}}", "index": n},
        }
        for n in range(4)
    ]
    parquet = tmp_path / "train.parquet"
    Dataset.from_list(rows).to_parquet(parquet)
    result = run("math", "--data", str(parquet), "--rows", "0", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    first = lines(tmp_path / "train.jsonl")[0]["messages"]
    assert [message["content"] for message in first] == ["0?" + BOXED, "\\boxed{0}"]


def test_medical_leaves_out_the_reasoning_and_rows_without_an_answer(tmp_path: Path) -> None:
    row = {
        "prompt": "Which vitamin?\nA. C\nB. D\n",
        "reasoning": "Hmm, wait.",
        "distilled_answer_string": "Scurvy lacks vitamin C. Answer: \\boxed{A}",
        "answer_letter": "A",
        "answer_string": "C",
        "text": "<|im_start|>think Hmm, wait.",
    }
    rows = [row, {**row, "distilled_answer_string": None}, {**row, "distilled_answer_string": " "}]
    data = write(tmp_path / "rows.jsonl", rows)
    result = run("medical", "--data", data, "--output", str(tmp_path))
    assert "2 without question or answer left out" in " ".join(result.output.split())
    (written,) = lines(tmp_path / "train.jsonl")
    assert written["messages"] == [
        {"role": "user", "content": "Which vitamin?\nA. C\nB. D" + BOXED},
        {"role": "assistant", "content": "Scurvy lacks vitamin C. Answer: \\boxed{A}"},
    ]
    assert "Hmm" not in (tmp_path / "train.jsonl").read_text()


def test_figfont_is_what_make_figfont_writes(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym", reason="needs the extra `paper`")
    import make_figfont

    result = run("figfont", "--train", "6", "--test", "2", "--output", str(tmp_path / "a"))
    assert result.exit_code == 0, result.output
    make_figfont.main(tmp_path / "b", train=6, test=2, seed=42)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("command", "rows", "options", "message"),
    [
        ("math", [{"problem": "1?", "answer": "1"}], [],
         "The math data needs the columns problem and solution; or extra_info.question and extra_info.answer, and has "
         "problem, answer."),
        ("medical", [{"prompt": "1?", "reasoning": "1"}], [],
         "The medical data needs the columns prompt and distilled_answer_string, and has prompt, reasoning."),
        ("math", numina(3), ["--rows", "4"], "--rows 4 is more than the 3 that there are."),
        ("math", None, [], "cannot be loaded"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named_in_one_line(
    command: str,
    rows: list[dict[str, Any]] | None,
    options: list[str],
    message: str,
    tmp_path: Path,
) -> None:
    data = write(tmp_path / "rows.jsonl", rows) if rows else str(tmp_path / "none.jsonl")
    result = run(command, "--data", data, "--output", str(tmp_path / "out"), *options)
    assert result.exit_code == 2
    assert message in result.output.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_no_half_file(tmp_path: Path) -> None:
    def interrupted() -> Any:
        yield {"messages": []}
        raise KeyboardInterrupt

    path = tmp_path / "train.jsonl"
    with pytest.raises(KeyboardInterrupt):
        prepare.write_lines(path, interrupted())
    assert not path.exists()
    assert prepare.write_lines(path, iter([{"a": "é"}])) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["train.jsonl"]


def test_an_empty_file_and_a_damaged_one_are_told(tmp_path: Path) -> None:
    for content, message in (
        ("", "has no rows"),
        ('{"problem": ', "rows.jsonl, line 1 is no JSON"),
    ):
        (tmp_path / "rows.jsonl").write_text(content)
        result = run("math", "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path))
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("│", "").split())


def test_a_first_row_without_an_answer_is_left_out_as_others_are(tmp_path: Path) -> None:
    rows = numina(3)
    rows[0]["problem"] = rows[0]["solution"] = None
    data = write(tmp_path / "rows.jsonl", rows)
    result = run("math", "--data", data, "--rows", "0", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert len(lines(tmp_path / "train.jsonl")) == 2
