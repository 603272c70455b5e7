"""`deft sft` takes the flags and YAML files of `trl sft`, with objectives."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

import deft_plugin
from deft_plugin import cli
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_directory(tmp_path: Path) -> Iterator[Path]:
    """A directory with a model in `model`, a data set in `data`, and nothing else."""
    tiny_model("qwen3", initializer_range=0.08).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    pairs = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(6)]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        lines = "\n".join(json.dumps(pair) for pair in pairs)
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    yield tmp_path
    deft_plugin.unregister()


def options(directory: Path) -> dict[str, object]:
    return {
        "model_name_or_path": str(directory / "model"),
        "dataset_name": str(directory / "data"),
        "output_dir": str(directory / "out"),
        "max_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "use_peft": True,
        "lora_target_modules": "all-linear",
    }


def flags(values: dict[str, object]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def logs(directory: Path) -> list[dict[str, float]]:
    state = json.loads((directory / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    return state["log_history"]


def saved_arguments(directory: Path) -> object:
    return torch.load(directory / "out" / "training_args.bin", weights_only=False)


def test_flags(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["--loss_type", "alpha", "--loss_kwargs", '{"a": 1.0}']
    monkeypatch.setattr(sys, "argv", ["deft", "sft", *flags(options(run_directory)), *own])
    cli.main()
    training, evaluation = logs(run_directory)[0], logs(run_directory)[-1]
    # The loss is 1 - p.
    assert training["mean_gate"] == pytest.approx(training["mean_target_probability"], rel=1e-6)
    assert training["loss"] == pytest.approx(1 - training["mean_target_probability"], rel=1e-5)
    assert "eval_nll" in evaluation
    assert saved_arguments(run_directory).loss_type == "alpha"  # type: ignore[attr-defined]
    assert (run_directory / "out" / "adapter_model.safetensors").exists()


def test_yaml_and_a_flag_over_it_as_accelerate_launch_runs_them(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"loss_type": "cayley_trans", "loss_kwargs": {"floor_coefficient": 0.25}}
    path = run_directory / "run.yaml"
    path.write_text(yaml.safe_dump({**options(run_directory), **own, "max_steps": 9}))
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", str(path), "--max_steps", "2"])
    # python -m deft_plugin.trl.sft
    monkeypatch.delitem(sys.modules, "deft_plugin.trl.sft", raising=False)
    runpy.run_module("deft_plugin.trl.sft", run_name="__main__")
    args = saved_arguments(run_directory)
    assert (args.loss_type, args.loss_kwargs) == tuple(own.values())  # type: ignore[attr-defined]
    assert 0 < logs(run_directory)[0]["mean_gate"] < 1


def test_trls_own_losses_stay_on_the_command_line(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["deft", "sft", *flags(options(run_directory)), "--loss_type", "dft"]
    monkeypatch.setattr(sys, "argv", argv)
    cli.main()
    assert "loss" in logs(run_directory)[0]
    assert "mean_gate" not in logs(run_directory)[0]


def test_unknown_loss_type_as_flag_names_the_choices(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["deft", "sft", *flags(options(run_directory)), "--loss_type", "deftt"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as refusal:
        cli.main()
    assert refusal.value.code == 2
    assert "cayley_trans" in last_line(capsys)


def test_unknown_loss_type_in_yaml_names_the_choices(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_directory / "run.yaml"
    path.write_text(yaml.safe_dump({**options(run_directory), "loss_type": "deftt"}))
    monkeypatch.setattr(sys, "argv", ["deft", "sft", "--config", str(path)])
    with pytest.raises(SystemExit) as refusal:
        cli.main()
    assert refusal.value.code == 2
    assert re.search(r"loss_type='deftt'.*cayley_trans", last_line(capsys))


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Of stderr, which begins with the command."""
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("deft sft: ")
    return line


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"no_such_flag": 1}, "no_such_flag"),
        ({"max_steps": "many"}, "invalid int value: 'many'"),
        ({"config": "none.yaml"}, "none.yaml"),
        ({"model_name_or_path": "./no-such-model"}, "./no-such-model"),
        # A refusal of this package's, once the trainer is made.
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 cannot be combined"),
    ],
    ids=str,
)
def test_what_a_user_can_put_right_is_said_in_a_line(
    own: dict[str, object],
    message: str,
    run_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = flags({**options(run_directory), "loss_type": "deft", **own})
    with pytest.raises(SystemExit) as refusal:
        cli.main(["sft", *arguments])
    assert refusal.value.code == 2
    assert message in last_line(capsys)


GOOD = '{"prompt": "So?", "completion": " No"}\n'


@pytest.mark.parametrize(
    ("files", "own", "message"),
    [
        ({"train": GOOD + '{"prompt": "Wh'}, {}, "--dataset_name {data!r} cannot be read: {data}/train.jsonl, line 2 is no JSON"),
        ({"train": '{"question": "So?"}'}, {}, "train_dataset has the columns question. Needed are"),
        ({"train": ""}, {}, "--dataset_name {data!r} cannot be read: a file has no rows"),
        ({"train": GOOD}, {"eval_strategy": "steps"}, "has no split 'test'. Add it (test.jsonl in a folder)"),
        ({"train": GOOD}, {"dataset_train_split": "training"}, "has no split 'training'"),
        ({}, {}, "{data}"),
        ({"train": GOOD}, {"dataset_name": __file__}, "is a file. Name its folder"),
        ({"train": GOOD}, {"model_name_or_path": "./none"}, "'./none' is neither a model's folder nor a model on the hub: there is no such folder"),
        ({"train": GOOD}, {"model_name_or_path": str(ROOT / "tests")}, "the folder has no config.json. Expected: a folder with"),
        ({"train": GOOD}, {"model_name_or_path": "nobody/none"}, "was not downloaded before"),
        ({"train": GOOD}, {"dataset_name": None}, "--dataset_name is missing. A model"),
        ({"train": GOOD}, {"model_name_or_path": None}, "--model_name_or_path is missing. A model"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("loss_type", ["deft", "nll"])
def test_mistakes_in_the_data_are_told_in_a_line(
    files: dict[str, str],
    own: dict[str, object],
    message: str,
    loss_type: str,
    run_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = run_directory / "mine"
    data.mkdir()
    for split, text in files.items():
        (data / f"{split}.jsonl").write_text(text)
    values = {
        **options(run_directory),
        "eval_strategy": "no",
        "dataset_name": str(data),
        "loss_type": loss_type,
        **own,
    }
    given = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(SystemExit) as refusal:
        cli.main(["sft", *flags(given)])
    assert refusal.value.code == 2
    assert message.format(data=str(data)) in last_line(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does it")
def test_precision_that_wants_a_gpu_says_how_to_do_without(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        name: value
        for name, value in options(run_directory).items()
        if name not in ("bf16", "use_cpu")
    }
    with pytest.raises(SystemExit):
        cli.main(["sft", *flags(values)])
    assert "--use_cpu True --bf16 False" in last_line(capsys)


def test_nothing_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sft"])
    assert "A model (a folder, or a name on the hub) and data" in last_line(capsys)


def test_a_config_without_its_file_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sft", "--config"])
    assert "--config needs a YAML file" in last_line(capsys)


def test_what_goes_wrong_in_training_keeps_its_traceback(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("transformers.Trainer.training_step", torn)
    with pytest.raises(OSError, match="the disk is full"):
        cli.main(["sft", *flags(options(run_directory)), "--loss_type", "nll"])


def test_help_has_the_flags_of_trl(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["sft", "--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    for flag in ("--model_name_or_path", "--loss_type", "--use_peft", "--config"):
        assert flag in text
    assert "Example: deft sft" in text


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed not installed")
def test_torchrun_with_zero2_logs_what_one_process_logs(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        **options(run_directory),
        "loss_type": "deft",
        "use_peft": False,
        "dtype": "float32",
        "learning_rate": 0.01,
    }
    two = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "deepspeed": str(ROOT / "deepspeed_configs/zero2.json"),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "deft_plugin.trl.sft", *flags(values | two)]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    distributed = logs(run_directory)
    one = flags(values | {"per_device_train_batch_size": 4})
    monkeypatch.setattr(sys, "argv", ["deft", "sft", *one])
    cli.main()
    for actual, expected in zip(distributed, logs(run_directory), strict=True):
        assert actual.keys() == expected.keys()
        for name in actual.keys() & {"loss", "grad_norm", "nll", "mean_gate", "eval_nll"}:
            assert actual[name] == pytest.approx(expected[name], rel=1e-4), name
