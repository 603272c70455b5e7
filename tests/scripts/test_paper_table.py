"""The paper's table: rows, columns, the paper's figures beside, and what a reader has to know."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("math_verify", reason="needs the extra `paper`")
from paper import record, table
from paper.benchmarks import MATH
from paper.experiments import BASE, LLAMA, OBJECTIVES

BENCHMARKS = {"minerva": 3, "aime24": 2}


def write(
    folder: Path,
    objective: str,
    base_model: str | None = LLAMA,
    *,
    left_out: int = 0,
    benchmarks: dict[str, int] = BENCHMARKS,
    **fields: Any,
) -> Path:
    """A finished file of answers as evaluate.py writes it, 16 samples a question."""
    header = {
        "suite": "math",
        "objective": objective,
        "base_model": base_model,
        "model": f"runs/{objective}",
        "training": {"objective": objective},
        "questions": benchmarks,
        "sampling": {"samples": 16, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4096, "seed": 0},
        "limit": None,
        **fields,
    }  # fmt: skip
    path = folder / f"{objective}.jsonl"
    record.start(path, header)
    generator = random.Random(objective)
    rows = [
        {
            "benchmark": benchmark,
            "index": index,
            "answers": [""] * 16,
            "scores": [generator.random() < 0.1 for _ in range(16)],
            "taken": ["A"] * 16,
        }
        for benchmark, count in benchmarks.items()
        for index in range(count)
    ]
    record.append(path, rows[: len(rows) - left_out])
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(table.app, list(map(str, arguments)), catch_exceptions=False)


def cells(text: str, title: str) -> list[list[str]]:
    """The rows of the table below a line, without the bold."""
    part = text.split(title)[1].split("\n\n")[1]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines()]
    return [[cell.strip("* ") for cell in row] for row in rows[:1] + rows[2:]]


def test_rows_are_objectives_and_columns_benchmarks_in_the_papers_order(tmp_path: Path) -> None:
    paths = [write(tmp_path, objective) for objective in reversed((BASE, *OBJECTIVES))]
    result = run(*paths)
    assert result.exit_code == 0, result.output
    head, *rows = cells(result.output, "average@16, in percent:")
    assert head == ["objective", "minerva", "aime24", "average", "paper"]
    assert [row[0] for row in rows] == ["base", "nll", "p", "EAFT", "Cayley-Trans", "DEFT"]
    assert [float(row[-1]) for row in rows] == [0.91, 6.49, 10.03, 6.76, 10.38, 11.35]
    for row, objective in zip(rows, (BASE, *OBJECTIVES), strict=True):
        _, answered = record.read(tmp_path / f"{objective}.jsonl")
        means = {
            benchmark: [sum(r["scores"]) / 16 for r in answered if r["benchmark"] == benchmark]
            for benchmark in BENCHMARKS
        }
        expected = [100 * sum(m) / len(m) for m in means.values()]
        assert row[1:4] == [f"{value:.2f}" for value in (*expected, sum(expected) / 2)]
    # pass@k is for reading; what the paper has is the mean over samples.
    assert cells(result.output, "pass@16, in percent:")[0][-1] == "average"


def test_pass_at_another_k(tmp_path: Path) -> None:
    path = write(tmp_path, "deft")
    _, *rows = cells(run(path, "--k", "1").output, "pass@1, in percent:")
    _, *means = cells(run(path).output, "average@16, in percent:")
    assert rows[0][1:4] == means[0][1:4]
    result = run(path, "--k", "17")
    assert result.exit_code == 2
    assert "pass@17 needs at least 17 samples" in result.output


def test_the_papers_figures_stand_beside_its_model_alone(tmp_path: Path) -> None:
    other = write(tmp_path / "a", "deft", "Qwen/Qwen2.5-7B")
    local = write(tmp_path / "b", "deft", "/models/Llama-3.1-8B")
    unnamed = write(tmp_path / "c", "deft", None)
    text = run(other, local, unnamed).output
    parts = text.split("## ")[1:]
    assert [part.splitlines()[0] for part in parts] == [
        "math, /models/Llama-3.1-8B",
        "math, base model not named",
        "math, Qwen/Qwen2.5-7B",
    ]
    assert ["| paper |" in part for part in parts] == [True, False, False]


def test_files_are_written_too(tmp_path: Path) -> None:
    paths = [write(tmp_path, objective) for objective in ("deft", "nll")]
    result = run(*paths, "--output", tmp_path / "out" / "table")
    assert (tmp_path / "out" / "table.md").read_text().strip() == result.output.strip()
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["objective"], row["figure"]) for row in rows] == [
        *(("nll", "average@16"), ("DEFT", "average@16"), ("nll", "pass@16"), ("DEFT", "pass@16"))
    ]
    assert [row["paper"] for row in rows] == ["6.49", "11.35", "", ""]


def test_the_best_of_a_column_is_bold(tmp_path: Path) -> None:
    text = run(*(write(tmp_path, objective) for objective in ("deft", "nll"))).output
    assert "**11.35**" in text
    assert "**6.49**" not in text


def test_what_is_not_the_papers_is_said(tmp_path: Path) -> None:
    sampling = {"samples": 16, "temperature": 0.6, "top_p": 1.0, "max_new_tokens": 4096, "seed": 0}
    training = {"objective": "deft", "not_the_papers": {"max_steps": 2, "global_batch_size": 8}}
    path = write(tmp_path, "deft", sampling=sampling, training=training, limit=3)
    assert (
        "- DEFT (runs/deft): max_steps 2 in training, global_batch_size 8 in training, temperature 0.6 instead of 1.0, "
        "average without olympiadbench, amc23, math500, the first 3 questions of each benchmark."
        in run(path).output
    )
    whole = dict.fromkeys(MATH, 1)
    assert "- DEFT" not in run(write(tmp_path / "papers", "deft", benchmarks=whole)).output


def test_benchmarks_that_a_row_lacks_are_said(tmp_path: Path) -> None:
    """Its average is another than those beside it, and than the paper's."""
    paths = [
        write(tmp_path, objective, suite="medical", benchmarks=benchmarks)
        for objective, benchmarks in (("nll", {"MedQA": 1, "GPQA": 1}), ("deft", {"MedQA": 1}))
    ]
    text = run(*paths).output
    assert "- DEFT (runs/deft): samples 16 instead of 1" in text
    assert ", average without GPQA." in text
    assert text.count("average without") == 1


@pytest.mark.parametrize("field", ["suite", "objective"])
def test_a_file_of_another_suite_or_objective_is_named(field: str, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    header = {"suite": "math", "objective": "deft", "questions": {}} | {field: "mine"}
    record.start(path, header)
    result = run(path, "--partial")
    assert result.exit_code == 2
    assert "'mine'" in result.output
    assert "Choices: math" in " ".join(result.output.split())


def test_a_file_that_is_not_finished_is_refused_unless_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "deft", left_out=2)
    result = run(path)
    assert result.exit_code == 2
    assert "has 3 of 5 questions" in " ".join(result.output.split())
    result = run(path, "--partial")
    assert result.exit_code == 0
    assert ", 3 of 5 questions." in result.output
    assert run(write(tmp_path / "none", "deft", left_out=5), "--partial").exit_code == 2


def test_another_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    result = run(path)
    assert result.exit_code == 2
    assert "is not a file of scripts/paper/evaluate.py" in " ".join(result.output.split())
