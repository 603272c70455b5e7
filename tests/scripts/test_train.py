"""The main job: from a 4-bit base model and data by name to an adapter that generates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open

from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("reasoning_gym", reason="needs the extra `scripts`")
pytest.importorskip("bitsandbytes")
import train
from typer.testing import CliRunner, Result

QUESTION = [{"role": "user", "content": "2 + 2"}]
ANSWER = [{"role": "assistant", "content": "4"}]
FORMATS = {
    "prompt and completion": {"prompt": "2 + 2 =", "completion": " 4"},
    "messages": {"messages": QUESTION + ANSWER},
    "text": {"text": "two and two are four"},
}


def run(*options: str) -> Result:
    """`train.py` in this process."""
    return CliRunner().invoke(train.app, list(options), catch_exceptions=False)


def start(scripts: Path, *options: str) -> subprocess.Popen[str]:
    """`train.py` as a user starts it."""
    return subprocess.Popen(
        [sys.executable, str(scripts / "train.py"), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_the_demo_in_miniature(scripts: Path, tmp_path: Path) -> None:
    """Everything that `make demo` does, on the shipped model, with fewer steps and questions."""
    size = ["--steps=20", "--batch-size=16", "--train-rows=320", "--held-out-rows=32"]
    process = start(scripts, *size, f"--output={tmp_path}")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors == "", "the console is kept free of what a reader cannot act on"
    assert "gives 32 of 32 answers as before it was saved" in output

    assert files(tmp_path) == {
        "adapter",
        "metrics.png",
        "objective.json",
        "results.json",
        "trainer_state.json",
    }
    results = json.loads((tmp_path / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert after["nll"] < 0.8 * before["nll"]
    assert after["mean_token_accuracy"] > before["mean_token_accuracy"] + 0.1
    assert 0 <= before["answer_accuracy"] <= after["answer_accuracy"] <= 1
    for name, value in after.items():
        assert f"{name.replace('_', ' ')}" in output
        assert (f"{value:,}" if isinstance(value, int) else f"{value:.4f}") in output

    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    held_out = {entry["step"]: entry["eval_nll"] for entry in log if "eval_nll" in entry}
    assert held_out[0] == before["nll"]
    assert held_out[20] == after["nll"]
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        learnt = [adapter.get_tensor(name) for name in adapter.keys() if "lora_B" in name]  # noqa: SIM118
    assert len(learnt) == 4 * 7
    assert all(tensor.any() for tensor in learnt)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> str:
    """A model without a chat template and without a pad token, as base models of the hub are."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("llama", hidden_size=64).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("row", FORMATS.values(), ids=list(FORMATS))
def test_any_model_and_data_set_are_trained_on(
    row: dict[str, Any], tiny_folder: str, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{json.dumps(row)}\n" * 20)
    result = run(
        *("--model", tiny_folder, "--dataset", str(data), "--output", str(tmp_path / "out")),
        *("--steps", "2", "--batch-size", "2", "--accumulation", "2", "--rank", "2"),
    )
    assert result.exit_code == 0, result.output
    assert "The reloaded adapter gives 2 of 2 answers" in result.output
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    assert figures["after"]["objective_loss"] != figures["before"]["objective_loss"]


@pytest.mark.parametrize(
    ("options", "figures"),
    [
        (["--loss-type=nll", "--no-four-bit"], {"loss", "entropy", "mean_token_accuracy"}),
        (["--loss-type=eaft", '--loss-kwargs={"k": 5}'], {"nll", "mean_gate", "entropy"}),
        (["--packing", "--max-length=64", "--assistant-only"], {"nll", "mean_focus"}),
    ],
)
def test_losses_and_options_reach_the_trainer(
    options: list[str], figures: set[str], tiny_folder: str, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{json.dumps(FORMATS['messages'])}\n" * 20)
    common = ["--model", tiny_folder, "--dataset", str(data), "--steps", "1", "--batch-size", "2"]
    result = run(*common, "--output", str(tmp_path / "out"), *options)
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert figures <= results["after"].keys() == results["before"].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss-type=defd"], "loss_type='defd': Unknown objective 'defd'. Did you mean 'deft'?"),
        (["--loss-kwargs={"], "loss_kwargs='{' is not JSON"),
        (["--loss-kwargs=[1]"], "loss_kwargs=[1] must be a dict"),
        (
            ["--loss-type=alpha", '--loss-kwargs={"b": 1}'],
            "'alpha' has no parameter 'b'. Valid choices: a.",
        ),
        (["--loss-type=nll", '--loss-kwargs={"a": 1}'], "loss_kwargs={'a': 1} would be ignored"),
        (["--model=no/such"], "--model 'no/such' is neither a model's folder nor a model on the hub"),
        (["--dataset=spell"], "Choices: a task (spell_backward, number_filtering), real data (asdiv, medmcqa, commonsense_qa), a file (.json"),
        (["--chat-template=none.jinja"], "--chat-template': file 'none.jinja' does not exist"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named_in_one_line_before_the_model_is_loaded(
    options: list[str], message: str, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_base", lambda *_: pytest.fail("The model was loaded."))
    result = run("--model", tiny_folder, *options)
    assert result.exit_code == 2
    *usage, error = result.output.splitlines()
    assert message in error
    assert not any("Traceback" in line for line in usage)


@pytest.mark.parametrize(
    "earlier", [{"adapter": "earlier"}, {}], ids=["over an earlier one", "new"]
)
def test_an_interrupted_save_leaves_no_half_adapter(
    earlier: dict[str, str], tmp_path: Path
) -> None:
    def interrupted(folder: str) -> None:
        Path(folder).mkdir()
        raise KeyboardInterrupt

    def whole(folder: str) -> None:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "adapter").write_text("new")

    adapter = tmp_path / "adapter"
    if earlier:
        adapter.mkdir()
        (adapter / "adapter").write_text("earlier")
    with pytest.raises(KeyboardInterrupt):
        train.save_whole(SimpleNamespace(save_model=interrupted), adapter)
    assert adapter.exists() == bool(earlier)
    assert {path.name: path.read_text() for path in adapter.glob("*")} == earlier

    train.save_whole(SimpleNamespace(save_model=whole), adapter)
    assert (adapter / "adapter").read_text() == "new"
    assert files(tmp_path) == {"adapter"}


@pytest.mark.slow
def test_ctrl_c_in_mid_training_ends_the_script_without_an_adapter(
    scripts: Path, tiny_folder: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    size = ["--steps=100000", "--train-rows=64", "--held-out-rows=8"]
    process = start(scripts, "--model", tiny_folder, *size, f"--output={output}")
    assert process.stdout is not None
    while "Training" not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in rest + errors
    assert not output.exists() or files(output) <= {"objective.json", "trainer_state.json"}
