"""The study: which runs are due, how a learning rate is chosen, what is measured, and what the tables say."""

from __future__ import annotations

import csv
import math
import multiprocessing
import random
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

study = pytest.importorskip("study", reason="needs the extra `scripts`")
import study_data  # noqa: E402
import study_measure  # noqa: E402
import study_results  # noqa: E402
import study_run  # noqa: E402
import study_tables  # noqa: E402
from answer_tokens import answer_tokens, exact_answers  # noqa: E402
from study_data import Row, StudyData  # noqa: E402
from study_results import BASE, Run  # noqa: E402
from study_run import Scale  # noqa: E402
from tasks import greedy_answers  # noqa: E402

ROWS = [Row(f"Spell this word backward: {word}", word[::-1]) for word in ("stone", "at", "rivers")]


def splits() -> dict[str, list[Row]]:
    words = ["".join(random.Random(n).sample("abcdefghij", 4)) for n in range(24)]
    rows = [Row(f"Spell this word backward: {word}", word[::-1]) for word in words]
    return {"train": rows[:16], "validation": rows[16:20], "test": rows[20:]}


def tiny_scale(**changes: Any) -> Scale:
    data = StudyData("tiny", "exact", splits, study_data.answer_of_another)
    scale = replace(
        study_run.SCALES["small"],
        data={"tiny": data},
        objectives=("nll", "deft"),
        learning_rates=(1e-3, 3e-3),
        train_rows=8,
        batch_size=4,
    )
    return replace(scale, **changes)


def line(**figures: float) -> dict[str, str]:
    return {name: str(value) for name, value in figures.items()}


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    folder = study_run.BASE_MODEL
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_the_test_split_waits_for_the_grid() -> None:
    scale = tiny_scale()
    results: dict[Run, dict[str, str]] = {}
    due, total = study.all_runs(results, scale, ["tiny"], 3)
    assert total == 1 + 2 * (2 + 3)
    assert [run.split for run in due] == ["test"] + ["validation"] * 4
    results |= {run: line(score=0.5, nll=1 + run.learning_rate) for run in due[:3]}
    due, total = study.all_runs(results, scale, ["tiny"], 3)
    assert total == 11
    assert [(run.objective, run.split, run.seed) for run in due[:3]] == [
        ("nll", "test", 1),
        ("nll", "test", 2),
        ("nll", "test", 3),
    ]
    assert {run.learning_rate for run in due[:3]} == {1e-3}
    assert [run.objective for run in due[3:]] == ["deft", "deft"]


@pytest.mark.parametrize(
    ("scores", "nlls", "chosen"),
    [
        ((0.5, 0.9, 0.1), (1.0, 3.0, 0.1), 1e-3),  # a better score, whatever its nll
        ((0.88, 0.9, 0.1), (1.0, 3.0, 0.1), 1e-4),  # as good a score: the better nll
        ((0.0, 0.0, 0.0), (3.0, 1.0, 2.0), 1e-3),  # no score at all
        ((1.0, 1.0, 0.99), (3.0, 2.0, 1.0), 1e-3),  # no error at a score of 1
    ],
)
def test_the_learning_rate_is_the_calmest_of_the_best(
    scores: tuple[float, ...], nlls: tuple[float, ...], chosen: float
) -> None:
    rates = (1e-4, 1e-3, 1e-2)
    grid = {
        Run("tiny", 0.0, "deft", rate, 0, "validation"): line(score=score, nll=nll)
        for rate, score, nll in zip(rates, scores, nlls, strict=True)
    }
    assert study.best_learning_rate(grid) == chosen


def test_a_results_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "results.csv"
    runs = [Run("tiny", 0.1, "deft", 3e-4, seed, "test") for seed in (1, 2)]
    for run in runs:
        study.append_result(path, run, {"nll": 1 / 3, "score": 0.5, "torch": "2.14"})
    results = study.read_results(path)
    assert list(results) == runs
    assert results[runs[0]]["nll"] == "0.333333"
    assert study.read_results(tmp_path / "absent.csv") == {}


FIGURES = {"nll": 0.5, "score": 0.25, "torch": "2.14"}


@pytest.mark.parametrize("cut", [1, 2, 9, 40])
def test_a_line_that_a_kill_has_cut_short_is_run_again(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    runs = [Run("tiny", 0.1, "deft", 3e-4, seed, "test") for seed in (1, 2, 3)]
    for run in runs[:2]:
        study.append_result(path, run, FIGURES)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line["seed"] for line in study_results.read_lines(path)] == ["1"]
    assert list(study.read_results(path)) == runs[:1]
    for run in runs[1:]:
        study.append_result(path, run, FIGURES)
    assert list(study.read_results(path)) == runs


def test_an_empty_file_gets_a_header(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.touch()
    run = Run("tiny", 0.1, "deft", 3e-4, 1, "test")
    assert study.read_results(path) == {}
    study.append_result(path, run, FIGURES)
    assert list(study.read_results(path)) == [run]


def test_a_run_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    for score in (0.25, 0.75):
        study.append_result(path, Run("tiny", 0.0, "nll", 1e-3, 1, "test"), {"score": score})
    assert [line["score"] for line in study_results.read_lines(path)] == ["0.75"]


@pytest.mark.parametrize("content", ["one line", "a,b\n1,2\n", "\0\udcff"])
def test_another_file_is_refused_and_stays(content: str, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    before = path.read_bytes()
    with pytest.raises(study.typer.BadParameter, match="is no results file of a study"):
        study.read_results(path)
    assert path.read_bytes() == before


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    study.append_result(path, Run("tiny", 0.0, "nll", 1e-3, 1, "test"), FIGURES)
    with path.open("a") as file:
        file.write("tiny,0.0,nll\n")
    with pytest.raises(study.typer.BadParameter, match="line 3 has not as many columns"):
        study.read_results(path)


def test_a_run_that_ends_in_nan_is_not_chosen_and_has_no_interval() -> None:
    def grid(*nlls: float) -> Any:
        rates = (1e-4, 1e-3, 1e-2)
        return {
            Run("tiny", 0.0, "deft", rate, 0, "validation"): line(score=0.5, nll=nll)
            for rate, nll in zip(rates, nlls, strict=True)
        }

    assert study.best_learning_rate(grid(math.nan, 2.0, 1.0)) == 1e-2
    assert study.best_learning_rate(grid(math.nan, math.nan, math.nan)) == 1e-4
    estimate = study_tables.Estimate.of([1.0, math.nan, 2.0])
    assert estimate.text(".1f") == "nan"
    assert not estimate.excludes_zero


def test_what_all_processes_need_is_fetched_before_they_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> None:
        raise RuntimeError("pip cannot\n download it")

    monkeypatch.setattr(study, "get_real_model", fail)
    monkeypatch.setattr(study, "run_study", None)
    with pytest.raises(study.typer.BadParameter, match="pip cannot download it"):
        study.real(tmp_path / "results.csv")


def test_corrupted_rows_are_as_many_as_asked_for_and_wrong() -> None:
    data = tiny_scale().data["tiny"]
    clean = study_data.training_rows(data, 10, 0.0, seed=3)
    corrupted = study_data.training_rows(data, 10, 0.4, seed=3)
    assert [row.question for row in clean] == [row.question for row in corrupted]
    assert all(row.answer == row.question.split()[-1][::-1] for row in clean)
    assert sum(a.answer != b.answer for a, b in zip(clean, corrupted, strict=True)) == 4
    assert study_data.training_rows(data, 10, 0.4, seed=3) == corrupted
    assert study_data.training_rows(data, 10, 0.4, seed=4) != corrupted


def test_wrong_answers_have_the_form_of_right_ones() -> None:
    apples, inches = Row("How many?", "12 apples"), Row("How long?", "3.5 inches")
    assert study_data.another_number(apples, inches) == "3.5 apples"
    assert study_data.another_number(apples, Row("Who?", "Yes")) == "Yes"
    assert study_data.another_number(Row("Who?", "Yes"), apples) == "12 apples"
    asked = Row("Which?\nA. Ulna\nB. Tibia\nC. Femur", "B. Tibia")
    wrong = {study_data.another_option(asked, Row("q" * n, "")) for n in range(4)}
    assert wrong == {"A. Ulna", "C. Femur"}


def test_answers_tokens_are_those_of_each_row_by_itself(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    together = answer_tokens(model, tokenizer, [row.messages for row in ROWS], 3)
    assert together.row.tolist() == [0] * 6 + [1] * 3 + [2] * 7
    for index, row in enumerate(ROWS):
        messages = row.messages["prompt"] + row.messages["completion"]
        ids = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=False)])
        count = len(row.answer) + 1  # letters, and the end of the turn
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0, -count - 1 : -1].double().log_softmax(1)
        own = together.row == index
        targets = ids[0, -count:, None]
        expected = {
            "log_p": log_p.gather(1, targets).squeeze(1),
            "collision": log_p.exp().square().sum(1),
            "entropy": -(log_p.exp() * log_p).sum(1),
            "top_p": log_p.exp().amax(1),
        }
        for name, values in expected.items():
            found = getattr(together, name)[own].double()
            torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-5)
        assert together.is_top1[own].tolist() == (log_p.argmax(1) == targets[:, 0]).tolist()


def test_exact_answers_are_the_greedy_ones(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    rows = study_data.SMALL["string_insertion"].load()["test"][:48]
    tokens = answer_tokens(model, tokenizer, [row.messages for row in rows], 16)
    with torch.inference_mode():
        greedy = greedy_answers(model, tokenizer, [row.messages["prompt"] for row in rows])
    right = sum(answer == row.answer for answer, row in zip(greedy, rows, strict=True))
    assert 0 < right < len(rows)
    assert exact_answers(tokens) == right / len(rows)


def test_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.95, 0.97, 0.5, 1.0])
    correct = torch.tensor([True, False, True, True])
    # The last bin of ten holds three, two of them right.
    expected = (abs(0.95 + 0.97 + 1.0 - 2) + abs(0.5 - 1)) / 4
    found = study_measure.calibration_error(confidence, correct, bins=10)
    assert math.isclose(found, expected, rel_tol=1e-6)


def test_first_tokens_are_scored_one_a_row(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    figures = study_measure.held_out_figures(model, tokenizer, ROWS, "first_token")
    assert figures["score"] in (0.0, 1 / 3, 2 / 3, 1.0)
    assert figures["tokens"] == 16


def test_p_and_dft_are_one_training_and_nll_is_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = tiny_scale()
    tokenizer = AutoTokenizer.from_pretrained(scale.model)
    trained = {}
    monkeypatch.setitem(study_run.LOSSES, "trl_nll", {"loss_type": "nll"})
    for objective in ("p", "dft", "nll", "trl_nll"):
        model = AutoModelForCausalLM.from_pretrained(scale.model, dtype=torch.float32)
        run = Run("tiny", 0.0, objective, 1e-3, 1, "test")
        rows = study_data.training_rows(scale.data["tiny"], 8, 0.0, 1)
        study_run.train(model, tokenizer, rows, run, scale)
        trained[objective] = torch.cat([p.detach().flatten() for p in model.parameters()])
    apart = (trained["p"] - trained["nll"]).norm()
    assert (trained["p"] - trained["dft"]).norm() < 0.05 * apart
    assert (trained["nll"] - trained["trl_nll"]).norm() < 0.05 * apart


def test_a_study_goes_on_where_it_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.csv"
    scale = tiny_scale(learning_rates=(1e-3,), objectives=("deft",))
    study.run_study(path, scale, ["tiny"], seeds=1, workers=1)
    first = path.read_text()
    assert len(first.splitlines()) == 1 + 3
    # Another process to import all would say nothing more.
    forking = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: forking)
    study.run_study(path, scale, ["tiny"], seeds=2, workers=1)
    assert path.read_text().startswith(first)
    assert len(path.read_text().splitlines()) == 1 + 4
    (case,) = study_tables.read_cases(path)
    assert len(case.after["deft"]) == 2


def results_file(path: Path) -> Path:
    columns = ("score", "nll", "calibration_error", "focus", "p", "other_nll", "seconds")
    versions = {"torch": "2.14.1", "transformers": "5.24.0", "trl": "1.16.0"}
    runs = [Run("tiny", 0.0, BASE, 0.0, 0, "test")]
    runs += [Run("tiny", 0.4, name, 1e-3, s, "test") for name in ("nll", "p") for s in (1, 2, 3)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(runs[0]), *columns, *versions])
        writer.writeheader()
        for run in runs:
            score = 0.5 + 0.1 * run.seed + (0.05 if run.objective == "p" else 0.0)
            figures = dict.fromkeys(columns, 1.0) | {"score": score}
            writer.writerow(asdict(run) | figures | versions)
    return path


def test_intervals_and_paired_differences(tmp_path: Path) -> None:
    (case,) = study_tables.read_cases(results_file(tmp_path / "real.csv"))
    estimate = case.estimate("p, dft", "score")
    assert math.isclose(estimate.mean, 0.75)
    # Student's t with two degrees of freedom, 4.3027, times 0.1 over the root of 3.
    assert math.isclose(estimate.half_width, 4.302653 * 0.1 / math.sqrt(3), rel_tol=1e-5)
    difference = case.difference("p, dft", "score")
    assert difference is not None
    assert math.isclose(difference.mean, 0.05)
    assert difference.half_width < 1e-12
    assert difference.excludes_zero
    assert case.difference("nll", "score") is None
    table = study_tables.full_table([case])
    assert "| `p, dft` | 1e-03 | 75.0 ± 24.8 | **+5.0 ± 0.0** |" in table
    assert "tiny, 40% corrupted" in study_tables.summary_table([case])
    study_tables.plot([case], tmp_path / "real.png")
    assert (tmp_path / "real.png").stat().st_size > 1000


def test_scores_by_learning_rate(tmp_path: Path) -> None:
    path = tmp_path / "small.csv"
    for rate, score in ((3e-3, 0.25), (1e-4, 0.5)):
        run = Run("tiny", 0.4, "p", rate, 0, "validation")
        study.append_result(path, run, {"score": score})
    assert study_tables.rates_table(path).splitlines() == [
        "| tiny, 40% corrupted | 1e-04 | 3e-03 |",
        "|---|---|---|",
        "| `p, dft` | 50.0 | 25.0 |",
    ]


def test_marked_places_are_filled_and_nothing_else() -> None:
    text = "a\n<!-- study: real -->\nold\n<!-- end of study -->\nb\n<!-- study: small -->\n<!-- end of study -->\n"
    filled = study_tables.fill(text, "real", "new | \\1\n")
    assert filled.startswith(
        "a\n<!-- study: real -->\n\nnew | \\1\n\n<!-- end of study -->\nb\n<!-- study: small -->"
    )
    assert study_tables.fill(filled, "real", "new | \\1\n") == filled


def test_the_docs_say_what_the_results_files_say() -> None:
    for page in study_tables.PAGES:
        text = (study_tables.DOCS / page).read_text()
        for name, content in study_tables.contents(study.RESULTS).items():
            assert study_tables.fill(text, name, content) == text, f"{page}: {name}"


def test_the_findings_figures_are_those_of_the_tables() -> None:
    text = (study_tables.DOCS / "docs/study.md").read_text()
    _, findings, rest = re.split("^## (?:Findings|How it was done)$", text, flags=re.MULTILINE)
    figures = re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", findings)
    assert len(figures) > 20
    assert not [
        figure
        for figure in figures
        if not re.search(rf"\| (\*\*)?{re.escape(figure)}(\*\*)? \|", rest)
    ]


def test_splits_of_the_small_tasks_do_not_overlap() -> None:
    for name in ("string_insertion", "spell_backward"):
        loaded = partial(study_data._task, name)()
        questions = [{row.question for row in rows} for rows in loaded.values()]
        assert sum(map(len, questions)) == len(set.union(*questions))
        assert [len(loaded[split]) for split in ("validation", "test")] == [128, 256]
