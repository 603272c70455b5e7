"""Asks a model the questions of a suite, and scores its answers: a line for each question in a file.

    python scripts/paper/evaluate.py runs/paper/math-deft/model --suite math
    python scripts/paper/evaluate.py meta-llama/Llama-3.1-8B --suite math --objective base
    python scripts/paper/evaluate.py MODEL --suite math --objective deft --data aime24=aime24.jsonl

Sampling is the paper's unless an option says otherwise. The same command goes on with a file that is not finished.
`table.py` reads the files.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import process_setup  # noqa: F401

# isort: split
import hashlib
import json
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from report import console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoConfig

from paper import record
from paper.benchmarks import Question, load_questions
from paper.chat import load_tokenizer, prompt_ids, stop_ids
from paper.choices import taken_option
from paper.experiments import BASE, EXPERIMENT_FILE, EXPERIMENTS, OBJECTIVES
from paper.generation import BACKENDS, Sampling, choose_backend, make_generator
from paper.summary import FIGURES, summarise

PACKAGES = ("torch", "transformers", "vllm", "math-verify", "latex2sympy2_extended", "rapidfuzz")
WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")


def score(suite: str, question: Question, answers: list[str]) -> dict[str, list[Any]]:
    """The scores of a question's answers, in their order, by name."""
    if suite == "math":
        from paper.maths import is_right

        return {"scores": [is_right(answer, question.reference) for answer in answers]}
    if suite == "medical":
        taken = [taken_option(answer, question.options) for answer in answers]
        return {"taken": taken, "scores": [option == question.reference for option in taken]}
    from paper.words import is_exact, jaro_winkler, winklers

    return {
        "scores": [jaro_winkler(answer, question.reference) for answer in answers],
        "exact": [is_exact(answer, question.reference) for answer in answers],
        "winklers": [winklers(answer, question.reference) for answer in answers],
    }


def revision_of(model: str, revision: str | None) -> str:
    """The commit of a model on the hub, or a digest of a folder's weights."""
    folder = Path(model)
    if not folder.is_dir():
        commit: str | None = getattr(
            AutoConfig.from_pretrained(model, revision=revision), "_commit_hash", None
        )
        return commit or revision or "unknown"
    digest = hashlib.sha256()
    for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def seed_of(seed: int, question: Question) -> int:
    """The question's own seed: 32 bits that follow from its benchmark and place."""
    text = f"{seed} {question.benchmark} {question.index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def training_of(model: str, objective: str | None) -> dict[str, Any]:
    """How the model was trained: what `train.py` left in its folder, or the objective that was named.

    Raises:
        ValueError: neither is there, or they disagree.
    """
    path = Path(model) / EXPERIMENT_FILE
    choices = (BASE, *OBJECTIVES)
    if objective is not None and objective not in choices:
        raise ValueError(f"--objective {objective!r} is none of {', '.join(choices)}.")
    if path.exists():
        try:
            training: dict[str, Any] = json.loads(path.read_text())
            known = training["objective"] in choices
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(f"{path} is not what train.py leaves: it has no objective of its own.")
        if objective not in (None, training["objective"]):
            raise ValueError(
                f"--objective {objective!r} is not what {path} says: {training['objective']!r}."
            )
        return training
    if objective is None:
        raise ValueError(
            f"{model} has no {EXPERIMENT_FILE} of train.py: say with --objective what it was trained with "
            f"({', '.join(choices)}), and with --base-model from what."
        )
    return {"objective": objective}


def parse_files(data: list[str]) -> dict[str, Path]:
    """Files by benchmark, from NAME=FILE; "" for a FILE without a name.

    Raises:
        ValueError: a file that is not there.
    """
    files = {}
    for entry in data:
        name, _, path = entry.rpartition("=")
        files[name] = Path(path)
        if not files[name].is_file():
            raise ValueError(f"--data {entry!r}: there is no file {path}.")
    return files


def installed(package: str) -> str | None:
    """A package's version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def figures_table(header: record.Header, rows: list[record.Row]) -> Table:
    """The suite's figures, a line for each benchmark."""
    names = FIGURES[header["suite"]]
    table = Table("benchmark", title=f"{header['suite']}, {header['objective']}, in percent")
    for name in names:
        table.add_column(name, justify="right")
    for benchmark, figures in summarise(header, rows).items():
        table.add_row(benchmark, *(f"{figures[name]:.2f}" for name in names))
    return table


def main(
    model: Annotated[str, typer.Argument(help="A folder, or a name on the hub.")],
    suite: Annotated[str, typer.Option(help=", ".join(EXPERIMENTS))],
    objective: Annotated[
        str | None,
        typer.Option(help=f"{BASE}, {', '.join(OBJECTIVES)}; known of a model of train.py."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="What it was trained from; known of a model of train.py.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="By default runs/paper/results/SUITE-MODEL.jsonl.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="FILE, or BENCHMARK=FILE, of the hub's columns; JSON or JSON lines."),
    ] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="Benchmarks of the suite; by default all.")
    ] = None,
    backend: Annotated[str, typer.Option(help=", ".join(BACKENDS))] = "auto",
    gpus: Annotated[int, typer.Option(min=1, help="That vLLM spreads the model over.")] = 1,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers to a question.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer.")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Questions asked at once; more for vLLM.")
    ] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each benchmark.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a model on the hub.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="For a model without one.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.")] = 0,
) -> None:
    """Ask, score, and print the suite's figures."""
    try:
        for option, value, choices in (
            ("--suite", suite, EXPERIMENTS),
            ("--backend", backend, BACKENDS),
        ):
            if value not in choices:
                raise ValueError(f"{option} {value!r} is none of {', '.join(choices)}.")
        papers = EXPERIMENTS[suite]
        sampling = Sampling(
            samples=papers.samples if samples is None else samples,
            temperature=papers.temperature if temperature is None else temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens or papers.max_new_tokens,
        )
        training = training_of(model, objective)
        backend = choose_backend(backend)
        questions = load_questions(suite, parse_files(data or []), benchmark or [], limit)
        tokenizer = load_tokenizer(model, chat_template, revision)
        texts = "\x1e".join(question.text + question.reference for question in questions)
        header: record.Header = {
            "suite": suite,
            "objective": training["objective"],
            "base_model": base_model
            or training.get("base_model")
            or (model if training["objective"] == BASE else None),
            "model": model,
            "revision": revision_of(model, revision),
            "training": training,
            "questions": Counter(question.benchmark for question in questions),
            "questions_digest": hashlib.sha256(texts.encode()).hexdigest(),
            "chat_template_digest": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
            "sampling": {**vars(sampling), "seed": seed},
            "limit": limit,
            "backend": backend,
            "batch_size": batch_size,
            "versions": {package: installed(package) for package in PACKAGES},
        }
        output = output or Path("runs/paper/results") / f"{suite}-{_short(model)}.jsonl"
        rows = record.start(output, header)
    except ValueError as error:
        raise typer.BadParameter(" ".join(str(error).split())) from None

    answered = {(row["benchmark"], row["index"]) for row in rows}
    batches = [
        questions[start : start + batch_size] for start in range(0, len(questions), batch_size)
    ]
    # A batch is asked as a whole again where some of it is missing: it is computed as it would have been.
    left = [
        batch
        for batch in batches
        if any((question.benchmark, question.index) not in answered for question in batch)
    ]
    console.print(
        f"{model}: {len(answered)} of {len(questions)} questions are answered in {output}."
    )
    if left:
        generator = make_generator(
            backend, model, revision, tokenizer, stop_ids(tokenizer), sampling, gpus
        )
        columns = (TextColumn(suite), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("questions", total=len(questions), completed=len(answered))
            for batch in left:
                new = [q for q in batch if (q.benchmark, q.index) not in answered]
                answers = generator.answers(
                    [prompt_ids(tokenizer, question.text) for question in batch],
                    [seed_of(seed, question) for question in batch],
                )
                for question, said in zip(batch, answers, strict=True):
                    if question not in new:
                        continue
                    row = {
                        "benchmark": question.benchmark,
                        "index": question.index,
                        "reference": question.reference,
                        "answers": said,
                        **score(suite, question, said),
                    }
                    record.append(output, [row])
                    progress.advance(bar)
    console.print(figures_table(*record.read(output)))


def _short(model: str) -> str:
    """A model's name for a file: runs/paper/math-deft/model is math-deft."""
    parts = [part for part in Path(model).parts if part != "model"]
    return parts[-1] if Path(model).is_dir() else model.replace("/", "--")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app()
