"""The paper's chain on the shipped model: data, two steps of training, evaluation, table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer import Typer
from typer.testing import CliRunner, Result

pytest.importorskip("math_verify", reason="needs the extra `paper`")
pytest.importorskip("rapidfuzz", reason="needs the extra `paper`")
from paper import evaluate, prepare, record, table, train

BASE_MODEL = str(Path(__file__).parents[2] / "assets/base_model")
SMALL = ["--model", BASE_MODEL, "--global-batch-size", "4", "--micro-batch-size", "2"]
SMALL += ["--max-length", "320"]


def run(app: Typer, *arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def done(app: Typer, *arguments: str) -> str:
    result = run(app, *arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with the columns of NuminaMath-CoT, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"problem": f"What is {n} + {n}?", "solution": f"It is $\\boxed{{{2 * n}}}$."}
        for n in range(20)
    ]
    path = tmp_path / "numina.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_from_problems_to_the_table(problems: str) -> None:
    done(prepare.app, "math", "--data", problems, "--rows", "10")
    for objective in ("nll", "deft"):
        done(train.app, "math", "--objective", objective, *SMALL, "--max-steps", "2")
    trained = json.loads(Path("runs/paper/math-deft/model/experiment.json").read_text())
    assert trained["not_the_papers"] == {
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "max_length": 320,
        "max_steps": 2,
    }
    assert (trained["steps"], trained["conversations"]) == (2, 10)
    weights = [
        load_file(f"runs/paper/math-{objective}/model/model.safetensors")
        for objective in ("nll", "deft")
    ]
    base = load_file(f"{BASE_MODEL}/model.safetensors")
    assert all(
        not torch.equal(w["model.norm.weight"], base["model.norm.weight"].float()) for w in weights
    )
    assert not torch.equal(*(w["model.norm.weight"] for w in weights))

    rows = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(2)]
    Path("aime24.json").write_text(json.dumps(rows))
    few = [
        "--suite",
        "math",
        "--data",
        "aime24=aime24.json",
        "--samples",
        "2",
        "--max-new-tokens",
        "8",
    ]
    done(evaluate.app, BASE_MODEL, *few, "--objective", "base")
    for objective in ("nll", "deft"):
        done(evaluate.app, f"runs/paper/math-{objective}/model", *few)
    results = sorted(map(str, Path("runs/paper/results").glob("*.jsonl")))
    assert len(results) == 3
    text = done(table.app, *results)
    for name in ("base", "nll", "DEFT"):
        assert f"| {name} |" in text
    assert "DEFT (runs/paper/math-deft/model): global_batch_size 4 in training" in text
    assert "samples 2 instead of 16" in text


def test_figfont_by_the_default_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym", reason="needs the extra `paper`")
    monkeypatch.chdir(tmp_path)
    done(prepare.app, "figfont", "--train", "24", "--test", "3")
    done(train.app, "figfont", "--objective", "cayley_trans", *SMALL, "--max-steps", "1")
    done(evaluate.app, "runs/paper/figfont-cayley_trans/model", "--suite", "figfont")
    header, rows = record.read(Path("runs/paper/results/figfont-figfont-cayley_trans.jsonl"))
    assert header["sampling"]["max_new_tokens"] == 5
    assert len(rows) == 3
    assert "| Cayley-Trans |" in done(
        table.app, "runs/paper/results/figfont-figfont-cayley_trans.jsonl"
    )


def test_an_interrupted_training_goes_on_to_the_same_weights(problems: str) -> None:
    done(prepare.app, "math", "--data", problems, "--rows", "10")
    steps = ["--max-steps", "3"]
    done(train.app, "math", "--objective", "deft", *SMALL, *steps, "--output", "whole")
    halves = ["math", "--objective", "deft", *SMALL, *steps, "--output", "halves"]
    assert "Stopped after step 1 of 3" in done(train.app, *halves, "--stop-after", "1")
    assert not Path("halves/model").exists()
    assert "checkpoint-1" in " ".join(done(train.app, *halves).split())
    whole, resumed = (load_file(f"{name}/model/model.safetensors") for name in ("whole", "halves"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor)

    before = Path("halves/model/model.safetensors").stat().st_mtime_ns
    assert "is there already" in done(train.app, *halves)
    assert Path("halves/model/model.safetensors").stat().st_mtime_ns == before
    other = run(train.app, *halves, "--learning-rate", "1e-3")
    assert other.exit_code == 2
    assert "learning_rate 5e-05, now 0.001" in " ".join(other.output.split())


@pytest.mark.slow
def test_two_ranks_train_what_one_does(problems: str, scripts: Path) -> None:
    done(prepare.app, "math", "--data", problems, "--rows", "12")
    options = ["math", "--objective", "deft", "--model", BASE_MODEL, "--global-batch-size", "4"]
    options += ["--max-length", "320", "--max-steps", "2", "--learning-rate", "1e-3"]
    done(train.app, *options, "--micro-batch-size", "2", "--output", "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(scripts / "paper/train.py"), *options, "--micro-batch-size=1", "--output=two"]
    process = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("The model is in two/model.") == 1
    one, two = (load_file(f"{name}/model/model.safetensors") for name in ("one", "two"))
    base = load_file(f"{BASE_MODEL}/model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
        assert not torch.equal(tensor, base[name].float())
    ranks = [json.loads(Path(name, "run.json").read_text())["ranks"] for name in ("one", "two")]
    assert ranks == [1, 2]


def test_the_loss_is_over_the_answer_alone(problems: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done(prepare.app, "math", "--data", problems, "--rows", "4")
    seen: list[Any] = []
    monkeypatch.setattr(train.SFTTrainer, "train", lambda self, **_: seen.append(self))
    monkeypatch.setattr(train, "save_whole", lambda *_: None)
    run(train.app, "math", "--objective", "deft", *SMALL, "--max-steps", "0")
    (trainer,) = seen
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        text = trainer.processing_class.decode(ids[labels != -100])
        assert text.startswith("It is $\\boxed{")
        assert text.endswith("<|end|>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["maths", "--objective", "deft"], "'maths' is none of math, medical, figfont."),
        (["math", "--objective", "dft"], "--objective 'dft' is none of nll, p, eaft, cayley_trans"),
        (["math", "--objective", "deft", "--dtype", "fp8"], "--dtype 'fp8' is none of"),
        (["math", "--objective", "deft"], "data/math/train.jsonl does not exist: scripts/paper/prepare.py"),
        (["math", "--objective", "deft", "--data", "texts.jsonl"], "needs the column messages, and has text."),
        (["math", "--objective", "deft", "--global-batch-size", "6"], "6 sequences a step are not a multiple of 4"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text('{"text": "a"}\n')
    result = run(train.app, *arguments, "--model", BASE_MODEL)
    assert result.exit_code == 2
    assert message in result.output.splitlines()[-1]
    assert not Path("runs").exists()
