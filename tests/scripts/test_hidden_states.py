"""Hidden states out of a model's folder are what its lm_head is given, and `skipping.py` measures on them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

hidden_states = pytest.importorskip("hidden_states", reason="needs the extra `scripts`")
skipping = pytest.importorskip("skipping", reason="needs the extra `scripts`")
real_model = pytest.importorskip("real_model", reason="needs the extra `scripts`")

BASE_MODEL = Path(__file__).resolve().parents[2] / "assets" / "base_model"


def run(script: Any, *arguments: object) -> str:
    import typer

    app = typer.Typer(add_completion=False)
    app.command()(script.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def plain_text(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and spelled itself backwards\n" * 20)
    return text


def test_states_of_plain_text_give_the_models_own_loss(tmp_path: Path, plain_text: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "states.safetensors"
    run(
        hidden_states,
        *(BASE_MODEL, "--text", plain_text, "--tokens", 63, "--length", 64, "--output", output),
    )
    tensors = load_file(output)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(BASE_MODEL)(
        plain_text.read_text(), return_tensors="pt"
    ).input_ids
    expected = model(input_ids=ids[:, :64], labels=ids[:, :64]).loss
    logits = tensors["hidden"] @ tensors["weight"].T
    actual = torch.nn.functional.cross_entropy(logits, tensors["targets"])
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


def test_states_of_a_data_set_are_of_its_completions(tmp_path: Path) -> None:
    rows = [{"question": "What is two and two?", "answer": f"It is {n}."} for n in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "states.safetensors"
    run(
        hidden_states,
        *(BASE_MODEL, "--dataset", data, "--columns", "question,answer", "--output", output),
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    targets = load_file(output)["targets"]
    text = tokenizer.decode(targets)
    assert "It is" in text
    assert "What" not in text


def test_the_sweep_writes_a_row_for_every_share_and_head(tmp_path: Path, plain_text: Path) -> None:
    states, output = tmp_path / "states.safetensors", tmp_path / "sweep"
    run(hidden_states, BASE_MODEL, "--text", plain_text, "--tokens", 200, "--output", states)
    said = run(
        skipping,
        *(states, "--share", 2**-3, "--repetitions", 1, "--output", output),
    )
    assert "2^-3" in said
    with (output / "skipping.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["head"], float(row["share"])) for row in rows] == [
        (head, share) for head in ("trainable", "frozen") for share in (0, 2**-3)
    ]
    assert all(float(row["hidden_error"]) < 2**-2 for row in rows)
    assert (output / "skipping.png").stat().st_size > 1000


def test_a_missing_file_is_named() -> None:
    import typer

    app = typer.Typer()
    app.command()(skipping.main)
    result = CliRunner().invoke(app, ["absent.safetensors"])
    assert result.exit_code == 2
    assert "absent.safetensors" in result.output


@pytest.mark.slow
def test_on_a_real_models_text_most_columns_earn_nothing(tmp_path: Path) -> None:
    model = real_model.get_real_model(tmp_path / "model")
    states = tmp_path / "states.safetensors"
    said = run(hidden_states, model, "--tokens", 512, "--output", states)
    # A language model, not noise: uniform guesses have 10.8 nats.
    assert 1.5 < float(said.split("nll ")[1].split(",")[0]) < 4
    given = skipping.load(str(states), None, "cpu", torch.float32)
    exact, row = skipping.measure(given, "deft", True, [0.0, 2**-9], 1)
    assert exact.skipped == 0
    assert row.skipped > 0.5
    assert row.hidden_error < skipping.bfloat16_error(given, "deft")
    assert math.isclose(given.weight.size(0), 49_152)
