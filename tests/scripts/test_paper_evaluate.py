"""The evaluation: every suite on a tiny model, resumed to the same file, refused where it would mix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("math_verify", reason="needs the extra `paper`")
pytest.importorskip("rapidfuzz", reason="needs the extra `paper`")
from paper import evaluate, generation, record
from paper.benchmarks import Question
from paper.evaluate import score, seed_of
from paper.summary import summarise

MATH = [{"problem": f"What is {n}+{n}?", "answer": str(2 * n)} for n in range(5)]
MEDICAL = {
    "MedQA": [{"question": "Which?", "options": {"A": "x", "B": "y"}, "answer_idx": "A"}] * 3,
    "PubMedQA": [{"question": "Is it?", "options": {"A": "yes", "B": "no"}, "answer_idx": "B"}] * 2,
}
FIGFONT = [
    {"messages": [{"role": "user", "content": f"Read {word}"}, {"role": "assistant", "content": word}]}
    for word in ("HAT", "CAT", "BEEHIVE")
]  # fmt: skip
SUITES: dict[str, tuple[Any, list[str]]] = {
    "math": (MATH, ["--samples", "3", "--temperature", "2", "--max-new-tokens", "5"]),
    "medical": (MEDICAL, ["--max-new-tokens", "5"]),
    "figfont": (FIGFONT, []),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def run(model: str, suite: str, folder: Path, *options: str, objective: str = "base") -> Result:
    content, usual = SUITES[suite]
    file = folder / f"{suite}.json"
    file.write_text(json.dumps(content))
    data = f"aime24={file}" if suite == "math" else str(file)
    arguments = [
        model,
        "--suite",
        suite,
        "--objective",
        objective,
        "--data",
        data,
        *usual,
        *options,
    ]
    if "--output" not in options:
        arguments += ["--output", str(folder / "answers.jsonl")]
    return CliRunner().invoke(evaluate.app, arguments, catch_exceptions=False)


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_on_a_tiny_model(suite: str, model: str, tmp_path: Path) -> None:
    result = run(model, suite, tmp_path)
    assert result.exit_code == 0, result.output
    header, rows = record.read(tmp_path / "answers.jsonl")
    assert (header["suite"], header["objective"], header["base_model"]) == (suite, "base", model)
    assert header["revision"].startswith("sha256:")
    assert sum(header["questions"].values()) == len(rows)
    assert {len(row["answers"]) for row in rows} == {header["sampling"]["samples"]}
    for row in rows:
        assert all(len(values) == len(row["answers"]) for values in (row["scores"],))
    for benchmark, figures in summarise(header, rows).items():
        assert benchmark in result.output
        assert all(0 <= value <= 100 for value in figures.values())
        assert f"{next(iter(figures.values())):.2f}" in result.output


class Interrupted:
    """A back end that ends after some batches, as a machine does."""

    def __init__(self, inner: generation.Generator, batches: int) -> None:
        self.inner, self.left = inner, batches

    def answers(self, prompts: Any, seeds: Any) -> list[list[str]]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return self.inner.answers(prompts, seeds)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("cut", [0, 7])
def test_resuming_after_an_interruption_gives_the_same_file(
    suite: str, cut: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    batch = ("--batch-size", "2")
    assert run(model, suite, tmp_path, *batch, "--output", str(whole)).exit_code == 0

    make = evaluate.make_generator
    monkeypatch.setattr(evaluate, "make_generator", lambda *args: Interrupted(make(*args), 1))
    stopped = run(model, suite, tmp_path, *batch, "--output", str(resumed))
    assert stopped.exit_code == 130
    assert len(record.read(resumed)[1]) == 2
    if cut:
        # In the middle of a row: half a batch is answered.
        resumed.write_bytes(resumed.read_bytes()[:-cut])
    monkeypatch.setattr(evaluate, "make_generator", make)
    assert run(model, suite, tmp_path, *batch, "--output", str(resumed)).exit_code == 0
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_finished_file_needs_no_model(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(model, "math", tmp_path)
    monkeypatch.setattr(evaluate, "make_generator", lambda *_: pytest.fail("The model was loaded."))
    again = run(model, "math", tmp_path)
    assert again.exit_code == 0
    assert "5 of 5 questions are answered" in " ".join(again.output.split())
    assert first.output.splitlines()[-5:] == again.output.splitlines()[-5:]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--temperature", "3"], "sampling"),
        (["--samples", "2"], "sampling"),
        (["--seed", "1"], "sampling"),
        (["--limit", "2"], "limit"),
        (["--batch-size", "3"], "batch_size"),
    ],
)
def test_another_evaluation_is_refused_with_what_to_do(
    options: list[str], named: str, model: str, tmp_path: Path
) -> None:
    assert run(model, "math", tmp_path).exit_code == 0
    result = run(model, "math", tmp_path, *options)
    assert result.exit_code == 2
    error = result.output.splitlines()[-1]
    assert f"{named} was " in error
    assert "take another --output" in error


def test_another_models_answers_are_refused(model: str, tmp_path: Path) -> None:
    """Of the same name, with other weights: trained on since."""
    folder = tmp_path / "model"
    tiny_tokenizer().save_pretrained(folder)
    tiny_model("llama").save_pretrained(folder)
    assert run(str(folder), "figfont", tmp_path).exit_code == 0
    tiny_model("llama", seed=1).save_pretrained(folder)
    result = run(str(folder), "figfont", tmp_path)
    assert result.exit_code == 2
    assert "revision was " in result.output.splitlines()[-1]


def test_the_objective_is_that_of_the_training_or_has_to_be_named(
    model: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny_tokenizer().save_pretrained(folder)
    tiny_model("llama").save_pretrained(folder)
    (tmp_path / "figfont.json").write_text(json.dumps(FIGFONT))
    unnamed = [str(folder), "--suite=figfont", f"--data={tmp_path / 'figfont.json'}"]
    unnamed += [f"--output={tmp_path / 'a.jsonl'}"]
    result = CliRunner().invoke(evaluate.app, unnamed)
    assert result.exit_code == 2
    assert "say with --objective what it was trained with (base, nll, p," in result.output

    training = {"objective": "deft", "base_model": "base/model", "not_the_papers": {}}
    (folder / "experiment.json").write_text(json.dumps(training))
    assert CliRunner().invoke(evaluate.app, unnamed).exit_code == 0
    header, _ = record.read(tmp_path / "a.jsonl")
    assert (header["objective"], header["base_model"]) == ("deft", "base/model")
    result = CliRunner().invoke(evaluate.app, [*unnamed, "--objective", "nll"])
    assert "--objective 'nll' is not what" in result.output


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        ("math", ["--temperature", "0"], "samples=3 at temperature=0"),
        ("math", ["--backend", "tgi"], "--backend 'tgi' is none of auto, vllm, transformers."),
        ("math", ["--benchmark", "aime25"], "'aime25' is not in the suite math."),
        ("math", ["--data", "amc23=none.json"], "there is no file none.json"),
        ("math", ["--objective", "dft"], "--objective 'dft' is none of base, nll, p, eaft,"),
    ],
)
def test_a_wrong_option_is_named_in_one_line_before_the_model_is_loaded(
    suite: str, options: list[str], message: str, model: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(evaluate, "make_generator", lambda *_: pytest.fail("The model was loaded."))
    result = run(model, suite, tmp_path, *options)
    assert result.exit_code == 2
    assert message in result.output.splitlines()[-1]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"objective": "mine"}'])
def test_a_record_of_something_else_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "experiment.json").write_text(content)
    with pytest.raises(ValueError, match=r"experiment\.json is not what train\.py leaves"):
        evaluate.training_of(str(tmp_path), None)


def test_a_question_has_a_seed_of_its_own() -> None:
    questions = [Question(b, n, "", "") for b in ("aime24", "amc23") for n in range(100)]
    seeds = {seed_of(seed, question) for seed in (0, 1) for question in questions}
    assert len(seeds) == 400
    assert max(seeds) < 2**32


def test_scores_of_each_suite() -> None:
    math = score("math", Question("aime24", 0, "", "1/2"), ["\\boxed{0.5}", "\\boxed{2}", ""])
    assert math == {"scores": [True, False, False]}
    options = {"A": "x", "B": "y"}
    medical = score("medical", Question("m", 0, "", "B", options), ["\\boxed{B}", "A", "who knows"])
    assert medical == {"taken": ["B", "A", None], "scores": [True, False, False]}
    word = score("figfont", Question("figfont", 0, "", "HAT"), ["hat", "HA", "dog"])
    assert word["exact"] == [True, False, False]
    assert word["scores"] == pytest.approx([1, 0.9111, 0], abs=1e-4)


def test_the_average_is_over_benchmarks_not_questions() -> None:
    header = {"suite": "medical", "sampling": {"samples": 1}}
    rows = [{"benchmark": "a", "taken": ["A"], "scores": [True]}] * 9
    rows += [{"benchmark": "b", "taken": [None], "scores": [False]}]
    figures = summarise(header, rows)
    assert figures["average"] == {"accuracy": 50.0, "no option taken": 50.0}
