"""`deft sft` takes the flags and YAML files of `trl sft`, with objectives."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import yaml

from deft_plugin import cli
from deft_plugin.trl.config import HAS_FUSED_HEAD
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("trl_as_it_was")


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A directory with a model in `model`, a data set in `data`, and nothing else."""
    tiny_model("qwen3", initializer_range=0.08).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    pairs = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(6)]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        lines = "\n".join(json.dumps(pair) for pair in pairs)
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    return tmp_path


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


def test_a_second_yaml_file(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_directory / "run.yaml"
    path.write_text(yaml.safe_dump({**options(run_directory), "loss_type": "deft"}))
    with pytest.raises(SystemExit):
        cli.main(["sft", "--config", str(path), "--config", str(path)])
    assert last_line(capsys) == "deft sft: --config is given twice, and one file can be."


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Of stderr, which begins with the command."""
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("deft sft: ")
    return line


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"num-processes": 2}, "deft sft: --num-processes is for accelerate, and deft sft starts one process."),
        ({"no_such_flag": 1}, "deft sft: --no_such_flag is no flag of deft sft."),
        ({"learnign_rate": -1}, "deft sft: --learnign_rate is no flag of deft sft. Did you mean --learning_rate?"),
        ({"learnign_rate=1": 1, "usepeft": "a"}, "no flag of deft sft. Did you mean --learning_rate? --usepeft is no flag of deft sft. Did you mean --use_peft?"),
        ({"resume_from_checkpoint": "true"}, "/out' has no checkpoint. Without the option the run begins anew."),
        ({"resume_from_checkpoint": "none/checkpoint-2"}, "--resume_from_checkpoint none/checkpoint-2: the folder 'none/checkpoint-2' does not exist. Without the option"),
        ({"resume_from_checkpoint": str(ROOT)}, f"the folder '{ROOT}' is no whole checkpoint, since it has no trainer_state.json. Without"),
        ({"max_steps": "many"}, "invalid int value: 'many'"),
        ({"config": "none.yaml"}, "none.yaml"),
        ({"model_name_or_path": "./no-such-model"}, "./no-such-model"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be a whole number of at least 1"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1 must be a whole number of at least 1"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps=-1 must be a whole number of at least 1"),
        ({"chat_template_path": "none.jinja"}, "--chat_template_path 'none.jinja': there is no such file or folder. Expected: a Jinja file"),
        ({"chat_template_path": "owner/none"}, "--chat_template_path 'owner/none': there is no such file or folder here, and from the hub"),
        ({"chat_template_path": str(ROOT / "tests")}, "with a tokenizer that has a chat template"),
        # A refusal of this package's, once the trainer is made.
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 cannot be combined"),
        ({"max_length": -5}, "max_length=-5 must be a whole number of at least 1"),
        ({"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs=0.0 must be a finite number above 0, or max_steps above 0: nothing would be trained"),
        ({"num_train_epochs": "nan", "max_steps": 0}, "num_train_epochs=nan must be a finite number above 0"),
        ({"metric_for_best_model": "eval_nope"}, "metric_for_best_model='eval_nope' is no metric of an evaluation. Choices: loss, objective_loss, nll"),
        ({"learning_rate": 0}, "learning_rate=0.0 must be a finite number above 0: nothing would be trained."),
        ({"learning_rate": -1}, "learning_rate=-1.0 must be a finite number above 0"),
        ({"learning_rate": "nan"}, "learning_rate=nan must be a finite number above 0"),
        # What transformers, torch and PEFT raise, once the model is loaded or the training prepared.
        ({"report_to": "swanlab"}, "SwanLabCallback requires swanlab to be installed"),
        ({"adam_beta1": 2}, "Cannot make an optimizer with --optim, --optim_args, --learning_rate, --weight_decay and --adam_*: Invalid beta parameter at index 0: 2.0"),
        ({"optim_args": "a"}, "--optim_args"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"nope": 2}'}, "Cannot make a scheduler with --lr_scheduler_type, --lr_scheduler_kwargs and --warmup_steps: "),
        ({"dataloader_num_workers": -1}, "Cannot make a loader of the data with --dataloader_*: num_workers option should be non-negative"),
        ({"lora_dropout": 1.5}, "Cannot make an adapter with --lora_*: dropout probability has to be between 0 and 1, but got 1.5"),
        ({"seed": -1}, "Cannot make random numbers with --seed: Seed must be between 0 and"),
        ({"output_dir": f"{__file__}/out"}, f"--output_dir '{__file__}/out' cannot be made: Not a directory."),
    ],
    ids=str,
)  # fmt: skip
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


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_nothing_is_trained_by_batches_of_none_under_trls_own_loss_either(
    name: str, run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (0, -1):
        with pytest.raises(SystemExit) as refusal:
            cli.main(["sft", *flags({**options(run_directory), "loss_type": "nll", name: size})])
        assert refusal.value.code == 2
        assert f"{name}={size} must be a whole number of at least 1" in last_line(capsys)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"num_processes": 2}, "deft sft: --config: num_processes is for accelerate, and deft sft starts one process."),
        ({"use_pefft": True}, "deft sft: --config has a key 'use_pefft', which deft sft does not know. Did you mean 'use_peft'?"),
        ({"loss-kwargs": {}, "qqq": 1}, "key 'loss-kwargs', which deft sft does not know. Did you mean 'loss_kwargs'? --config has a key 'qqq', which deft sft does not know."),
        ({"resume_from_checkpoint": True}, "/out' has no checkpoint. Without the option the run begins anew."),
        ({"datasets": "data"}, "datasets: 'data' must be a list of mappings, each with path."),
        ({"datasets": ["data"]}, "datasets: ['data'] must be a list of mappings, each with path."),
        ({"datasets": [{"path": 3}]}, "datasets[0].path 3 is no text"),
        ({"learning_rate": "fast"}, "invalid float value: 'fast'"),
        ({"loss_kwargs": 3}, "loss_kwargs=3 must be a dict or JSON text"),
        ({"loss_type": ["deft"]}, "loss_type=['deft']: Unknown objective ['deft']. Did you mean 'deft'?"),
        ({"dataset_name": 3}, "--dataset_name 3 is no text"),
        ({"dataset_train_split": 3}, "--dataset_train_split 3 is no text"),
        ({"num_train_epochs": "none"}, "invalid float value: 'none'"),
        ({"num_train_epochs": None}, "num_train_epochs: None must be a number."),
        ({"max_steps": 1.5}, "max_steps: 1.5 must be a whole number."),
        ({"per_device_train_batch_size": 2.0}, "per_device_train_batch_size=2.0 must be a whole number of at least 1."),
        ({"report_to": {}}, "report_to: {} must be null or text or a list."),
        ({"lora_target_modules": 3}, "lora_target_modules: 3 must be a list or null."),
        ({"model_init_kwargs": 3}, "model_init_kwargs: 3 must be a mapping or text or null."),
        ({"parallelism_config": 3}, "parallelism_config: 3 must be a mapping or null."),
        ({"eval_strategy": False}, 'eval_strategy: False must be text: YAML reads no as false; write "no" in quotes.'),
        ({"logging_strategy": False}, "logging_strategy: False must be text: YAML reads no as false"),
        ({"eval_strategy": "epochs"}, "eval_strategy: 'epochs' is not valid. Choices: no, steps, epoch."),
        ({"save_strategy": 5}, "save_strategy: 5 is not valid. Choices: no, steps, epoch, best."),
        ({"logging_strategy": None}, "logging_strategy: None is not valid. Choices: no, steps, epoch."),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: 'cosin' is not valid. Choices: linear, cosine, "),
        ({"optim": "adam"}, "optim: 'adam' is not valid. Choices: adamw_torch, "),
        ({"hub_strategy": ["end"]}, "hub_strategy: ['end'] is not valid. Choices: end, every_save, "),
        ({"output_dir": 5}, "output_dir: 5 must be text: write it in quotes."),
        ({"model_name_or_path": "~/model"}, "--model_name_or_path '~/model': ~ is expanded by a shell, not in a YAML"),
        ({"dataset_name": "~/data"}, "--dataset_name '~/data': ~ is expanded by a shell, not in a YAML"),
        ({"chat_template_path": "~/x.jinja"}, "--chat_template_path '~/x.jinja': ~ is expanded by a shell, not in"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("loss_type", ["deft", "nll"])
def test_mistakes_in_a_yaml_file_are_told_in_a_line(
    own: dict[str, object],
    message: str,
    loss_type: str,
    run_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = run_directory / "run.yaml"
    path.write_text(yaml.safe_dump({**options(run_directory), "loss_type": loss_type, **own}))
    with pytest.raises(SystemExit) as refusal:
        cli.main(["sft", "--config", str(path)])
    assert refusal.value.code == 2
    assert message in last_line(capsys)


def test_values_of_a_yaml_file_that_trl_takes_are_taken(run_directory: Path) -> None:
    template = run_directory / "own.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    own = {
        "learning_rate": "1e-4",
        "num_train_epochs": 1,
        "report_to": ["none"],
        "lora_target_modules": "all-linear",
        "lora_modules_to_save": ["lm_head"],
        "lora_alpha": 8.5,
        "lr_scheduler_kwargs": "{}",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": 1,
        "run_name": 7,
        "use_dora": None,
        "dataset_name": None,
        "datasets": [{"path": str(run_directory / "data")}],
        "eval_strategy": "no",
        "fsdp": [],
        "chat_template_path": str(template),
    }
    path = run_directory / "run.yaml"
    path.write_text(yaml.safe_dump({**options(run_directory), "loss_type": "deft", **own}))
    cli.main(["sft", "--config", str(path)])
    assert saved_arguments(run_directory).learning_rate == 1e-4  # type: ignore[attr-defined]
    assert 0 < logs(run_directory)[0]["mean_gate"] < 1


def test_accelerate_launch_is_told_the_same(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**options(run_directory), "loss_type": "deft", "dataset_name": "~/data"}
    monkeypatch.setattr(sys, "argv", ["sft.py", *flags(values)])
    monkeypatch.delitem(sys.modules, "deft_plugin.trl.sft", raising=False)
    with pytest.raises(ValueError, match="'~/data': ~ is expanded by a shell"):
        runpy.run_module("deft_plugin.trl.sft", run_name="__main__")


GOOD = '{"prompt": "So?", "completion": " No"}\n'


@pytest.mark.parametrize(
    ("files", "own", "message"),
    [
        ({"train": GOOD + '{"prompt": "Wh'}, {}, "--dataset_name {data!r} cannot be read: {data}/train.jsonl, line 2 is no JSON"),
        ({"train": '{"question": "So?"}'}, {}, "train_dataset has the columns question. Needed are"),
        ({"train": GOOD + '{"prompt": "Why?", "completion": 5}'}, {}, "train_dataset, row 1: the column completion holds 5 (int), and text"),
        ({"train": '{"text": "a"}\n{"text": "b"}\n{"text": ["c"]}'}, {}, "train_dataset, row 2: the column text holds ['c'] (list), and text is"),
        ({"train": GOOD + '{"prompt": "Why?", "completion": null}'}, {}, "1 of 2 rows have no completion, the first being row 1"),
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
    assert last_line(capsys).endswith(" Without a GPU add --use_cpu True --bf16 False.")
    path = run_directory / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit):
        cli.main(["sft", "--config", str(path)])
    assert last_line(capsys).endswith(" Without a GPU add `use_cpu: true` and `bf16: false`.")


def test_nothing_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sft"])
    assert "A model (a folder, or a name on the hub) and data" in last_line(capsys)


def test_a_config_without_its_file_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sft", "--config"])
    assert "--config needs a YAML file" in last_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.yaml"], "'run.yaml' is neither a flag nor the value of one. Did you mean deft sft --config run.yaml?"),
        (["model", "--max_steps", "2"], "Did you mean deft sft --config model?"),
        (["--max_steps", "2", "run.yml"], "Did you mean deft sft --config run.yml?"),
        (["--max_steps", "2", "3"], "'3' is neither a flag nor the value of one."),
        (["--config=run.yaml"], "--config=run.yaml needs a space in place of =: --config run.yaml."),
    ],
    ids=str,
)  # fmt: skip
def test_what_belongs_to_no_flag_is_told_before_anything_else(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        cli.main(["sft", *arguments])
    assert refusal.value.code == 2
    assert last_line(capsys).endswith(message)


NO_LOSS_TYPE = "deft sft: --loss_type is not given, so that TRL's own loss is trained, 'nll'. Add --loss_type deft"


@pytest.mark.parametrize(
    ("flag", "in_yaml", "is_told"),
    [(None, None, True), ("nll", None, False), (None, "nll", False), ("deft", "nll", False)],
)
def test_a_loss_that_was_not_asked_for_is_named(
    flag: str | None,
    in_yaml: str | None,
    is_told: bool,
    run_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # No need to train.
    trained: list[Any] = []
    monkeypatch.setattr("trl.scripts.sft.main", lambda *arguments: trained.append(arguments[1]))
    path = run_directory / "run.yaml"
    path.write_text(yaml.safe_dump({**options(run_directory), "loss_type": in_yaml}))
    cli.main(["sft", "--config", str(path), *flags({"loss_type": flag} if flag else {})])
    assert (NO_LOSS_TYPE in capsys.readouterr().err) == is_told
    default = trl.SFTConfig(str(run_directory), use_cpu=True, bf16=False).loss_type
    assert trained[0].loss_type == (flag or in_yaml or default)


@pytest.mark.parametrize("word", ["true", "Yes", True, "checkpoint-1"])
def test_a_run_goes_on_from_its_last_checkpoint(word: object, run_directory: Path) -> None:
    values = {**options(run_directory), "loss_type": "deft", "save_steps": 1, "max_steps": 1}
    cli.main(["sft", *flags(values)])
    out = run_directory / "out"
    first = out / "checkpoint-1" / "trainer_state.json"
    written = first.stat().st_mtime_ns
    given = str(out / "checkpoint-1") if word == "checkpoint-1" else word
    path = run_directory / "run.yaml"
    path.write_text(yaml.safe_dump({"resume_from_checkpoint": given}))
    cli.main(["sft", *flags({**values, "max_steps": 2}), "--config", str(path)])
    # Neither made anew, nor from the beginning.
    assert first.stat().st_mtime_ns == written
    assert [entry["step"] for entry in logs(run_directory) if "loss" in entry] == [1, 2]
    assert saved_arguments(run_directory).resume_from_checkpoint == str(out / "checkpoint-1")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "fault",
    [OSError("the disk is full"), ValueError("Invalid learning rate: -1.0")],
    ids=["a disk's", "as a setting's"],
)
def test_what_goes_wrong_in_training_keeps_its_traceback(
    fault: Exception, run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(*_: object) -> None:
        raise fault

    monkeypatch.setattr("transformers.Trainer.training_step", torn)
    with pytest.raises(type(fault), match=re.escape(str(fault))):
        cli.main(["sft", *flags(options(run_directory)), "--loss_type", "nll"])


def test_debugging_shows_where_a_setting_fails(run_directory: Path) -> None:
    values = {**options(run_directory), "adam_beta1": 2, "log_level": "debug"}
    with pytest.raises(ValueError, match="Invalid beta parameter"):
        cli.main(["sft", *flags(values), "--loss_type", "deft"])


@pytest.mark.skipif(not HAS_FUSED_HEAD, reason="TRL 1.9's command leaves model_init_kwargs out")
def test_an_argument_that_the_model_does_not_take_is_told_in_a_line(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**options(run_directory), "model_init_kwargs": '{"nope": 1}', "loss_type": "deft"}
    with pytest.raises(SystemExit):
        cli.main(["sft", *flags(values)])
    assert re.search(r"--model_init_kwargs: .*keyword argument 'nope'\.$", last_line(capsys))


@pytest.mark.parametrize("metric", ["eval_nll", "samples_per_second", "eval_num_tokens"])
def test_metrics_that_an_evaluation_has_may_choose_the_checkpoint(
    metric: str, run_directory: Path
) -> None:
    own = {"metric_for_best_model": metric, "load_best_model_at_end": True, "loss_type": "deft"}
    cli.main(["sft", *flags({**options(run_directory), **own})])
    state = json.loads((run_directory / "out/checkpoint-2/trainer_state.json").read_text())
    (evaluation,) = (entry for entry in logs(run_directory) if "eval_loss" in entry)
    assert state["best_metric"] == evaluation[f"eval_{metric.removeprefix('eval_')}"]


def test_help_has_the_flags_of_trl(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["sft", "--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    for flag in ("--model_name_or_path", "--loss_type", "--use_peft", "--config"):
        assert flag in text
    assert "Example: deft sft" in text
    assert "Without one TRL's own 'nll' is trained." in " ".join(text.split())


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
