"""`deft doctor` names what keeps an environment or a YAML from training with an objective."""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deft_plugin import cli, doctor
from deft_plugin.doctor import check_environment
from deft_plugin.doctor import loss as loss_room
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("trl_as_it_was")


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str]:
    """Exit status and output of `deft doctor`."""
    monkeypatch.setattr("sys.argv", ["deft", "doctor", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), capsys.readouterr().out


def errors_of(path: Path, **values: Any) -> list[str]:
    """The errors in a YAML with these keys."""
    path.write_text(yaml.safe_dump(values))
    return [found.text for found in doctor.check_yaml(path) if found.level == "error"]


def test_the_environment_of_the_tests_is_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, output = run(capsys, monkeypatch)
    assert status == 0
    assert f"torch {importlib.metadata.version('torch')}" in output
    assert "agree with the definition" in output
    assert "error" not in output
    assert ("Axolotl can import" in output) == (find_spec("axolotl") is not None)


def test_of_the_environment_a_file_is_told_what_is_wrong_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter_config.json"
    adapter.write_text('{"peft_type": "LORA"}')
    environment = [*check_environment()]
    # Notes too: that Axolotl is not installed is nothing to one who trains with TRL.
    rest = sum(found.level != "error" for found in environment)
    lists_them = f"  ok     the rest ({rest} findings) is listed by `deft doctor` alone"
    status, output = run(capsys, monkeypatch, str(adapter))
    title, *told, of_the_file, _ = output.splitlines()
    assert (status, title, of_the_file) == (0, "environment", str(adapter))
    assert told == [lists_them]
    # Of one that lacks something, that too, and the status says so.
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.8.0" if name == "trl" else version(name)
    )
    status, output = run(capsys, monkeypatch, str(adapter))
    assert status == 1
    assert "  error  trl is 1.8.0" in output
    assert f"the rest ({rest - 1} findings)" in output


def test_a_version_that_does_not_fit_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.8.0" if name == "trl" else version(name)
    )
    status, output = run(capsys, monkeypatch)
    assert status == 1
    assert "trl is 1.8.0" in output
    assert ">=1.9" in output


def test_a_loss_that_is_wrong_on_the_device_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = loss_room.linear_gated_loss

    def wrong(*arguments: Any, path: str, **options: Any) -> Any:
        return loss(
            *arguments, path=path, **options | {"logit_scale": 1.1 if path == "auto" else 1}
        )

    monkeypatch.setattr(loss_room, "linear_gated_loss", wrong)
    status, output = run(capsys, monkeypatch)
    assert status == 1
    assert "differs from its definition" in output


def test_a_build_of_torch_for_a_gpu_that_is_not_there_is_checked_on_the_cpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def current_accelerator(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    status, output = run(capsys, monkeypatch)
    assert status == 0
    assert "device cpu: losses run on the chunked path" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that cannot be used")
def test_files_are_looked_at_also_where_the_device_cannot_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: broken)
    status, output = run(capsys, monkeypatch, str(tmp_path / "none.yaml"))
    assert status == 1
    assert "on this device: " in output
    assert "none.yaml" in output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("loss_type: [", "cannot be read"),
        ("deft", "is not a YAML mapping"),
        ("loss_type: deft", "neither base_model (Axolotl) nor model_name_or_path (trl sft)"),
    ],
)
def test_a_file_that_is_no_configuration_is_an_error(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    (finding,) = doctor.check_yaml(path)
    assert finding.level == "error"
    assert message in finding.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", b'{"text": "a"}\n{"text": "b"}\n'),
        ("train.jsonl", b'{"text": "a"}\n'),
        ("train.json", b'[{"text": "a"}]'),
        ("train.csv", b"text\na\n"),
        ("train.parquet", b"PAR1\xff\xe9"),
    ],
    ids=str,
)
def test_a_file_of_data_is_told_where_data_are_looked_at(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    (finding,) = doctor.check_yaml(path)
    assert finding.level == "error"
    assert finding.text == (
        "is no YAML of a run, nor an adapter's folder; for data there is `deft report MODEL --data`"
    )


def test_a_file_that_is_not_there_fails_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, output = run(capsys, monkeypatch, str(tmp_path / "none.yaml"))
    assert status == 1
    assert "none.yaml" in output
    assert "cannot be read" in output


TRL = {"model_name_or_path": "not-loaded", "dataset_name": "not-loaded", "use_cpu": True}
TRL |= {"bf16": False, "report_to": "none"}
PAIR = '{"prompt": "So?", "completion": " No"}'


def save_data(folder: Path, **files: str) -> Path:
    """A folder with a .jsonl file for each split."""
    folder.mkdir()
    for split, text in files.items():
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def test_a_trl_file_with_an_objective_is_fine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    values = {
        **TRL,
        "output_dir": str(tmp_path),
        "loss_type": "alpha",
        "loss_kwargs": '{"a": 0.25, "histograms": true}',
    }
    path.write_text(yaml.safe_dump(values))
    status, output = run(capsys, monkeypatch, str(path))
    assert status == 0
    assert "a=0.25" in output


@pytest.mark.parametrize(
    ("loss_type", "instead"),
    [
        ("nll", "alpha with loss_kwargs {a: 0} is nll with all metrics"),
        ("chunked_nll", "alpha with loss_kwargs {a: 0} is nll with all metrics"),
        ("dft", "p has the gradient of dft, with all metrics"),
    ],
)
def test_a_trl_file_that_asks_for_trls_own_loss_is_fine_and_told_so(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    loss_type: str,
    instead: str,
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TRL, "output_dir": str(tmp_path), "loss_type": loss_type}))
    status, output = run(capsys, monkeypatch, str(path))
    assert status == 0
    assert f"  note   loss_type: {loss_type} trains TRL's own loss; {instead}" in output


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "loss_type is not set: TRL's own loss would be trained. Add loss_type: deft"),
        ({"loss_type": None}, "or loss_type: nll if that is meant"),
        ({"loss_type": "nll", "loss_kwargs": {"a": 0}}, "would be ignored: loss_type='nll'"),
        ({"loss_type": "dfet"}, "dfet"),
        ({"loss_type": "alpha", "loss_kwargs": '{"b": 1}'}, "'b'"),
        (
            {"loss_type": "deft", "loss_kwargs": {"histograms": 1}},
            "histograms is 1; it must be true",
        ),
        ({"loss_type": "deft", "no_such_key": 1}, "no_such_key"),
    ],
)
def test_a_trl_file_without_a_valid_objective_is_an_error(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    (error,) = errors_of(tmp_path / "run.yaml", **TRL, output_dir=str(tmp_path), **keys)
    assert message in error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 cannot be combined"),
        (
            {"use_peft": True, "use_dora": True, "lora_target_modules": ["lm_head"]},
            "DoRA on lm_head",
        ),
    ],
    ids=str,
)
def test_a_trl_file_whose_run_would_be_refused_is_an_error(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    (error,) = errors_of(
        tmp_path / "run.yaml", **TRL, output_dir=str(tmp_path), loss_type="deft", **values
    )
    assert message in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does it")
def test_precision_that_wants_a_gpu_says_how_to_do_without(tmp_path: Path) -> None:
    values = {name: value for name, value in TRL.items() if name not in ("bf16", "use_cpu")}
    values |= {"output_dir": str(tmp_path), "loss_type": "deft"}
    (error,) = errors_of(tmp_path / "run.yaml", **values)
    assert "bf16" in error
    assert error.endswith(" Without a GPU add `use_cpu: true` and `bf16: false`.")


def test_all_that_is_wrong_in_a_trl_file_is_told_at_once(tmp_path: Path) -> None:
    values = {
        "lossy_type": "deft",
        "loss_type": "alpha",
        "loss_kwargs": {"b": 1},
        "label_smoothing_factor": 0.1,
        "use_peft": True,
        "use_dora": True,
        "lora_target_modules": ["lm_head"],
    }
    errors = errors_of(tmp_path / "run.yaml", **TRL, output_dir=str(tmp_path), **values)
    assert len(errors) == 4
    assert "unknown key 'lossy_type'" in errors[0]
    assert "Did you mean 'loss_type'?" in errors[0]
    assert "no parameter 'b'" in errors[1]
    assert "label_smoothing_factor=0.1 cannot be combined with loss_type='alpha'" in errors[2]
    assert "DoRA on lm_head" in errors[3]


@pytest.mark.parametrize(
    ("values", "level", "message"),
    [
        ({"dataset_name": "./none"}, "error", "dataset_name: ./none does not exist"),
        ({"dataset_name": "a/b/none"}, "error", "dataset_name: a/b/none does not exist"),
        ({"dataset_name": "data/mine"}, "note", "dataset_name: data/mine is no folder here, and is looked for on the hub"),
        ({"dataset_name": "mine"}, "note", "dataset_name: mine is no folder here, and is looked for on the hub"),
        ({"model_name_or_path": "/none"}, "error", "model_name_or_path: /none does not exist"),
        ({"model_name_or_path": "owner/name"}, "note", "model_name_or_path: owner/name is no folder here"),
        ({"chat_template_path": "none.jinja"}, "error", "chat_template_path: none.jinja does not exist"),
        ({"datasets": [{"path": "./none"}]}, "error", "datasets[0].path: ./none does not exist"),
        ({"datasets": [{"path": "json", "data_files": "/none.jsonl"}]}, "error", "datasets[0].data_files: /none.jsonl does not exist"),
        ({"datasets": [{"path": "csv", "data_files": ["none"]}]}, "error", "datasets[0].data_files: none does not exist"),
        ({"datasets": [{"path": "json", "data_files": {"train": __file__, "test": "/none"}}]}, "error", "data_files: /none does"),
        ({"datasets": [{"path": "json", "data_dir": "/none", "data_files": "x"}]}, "error", "data_files: /none/x does not exist"),
        ({"datasets": [{"path": str(Path(__file__).parent), "data_files": "none"}]}, "error", "tests/doctor/none does not exist"),
        ({"dataset_name": "~/data"}, "error", "--dataset_name '~/data': ~ is expanded by a shell"),
        ({"dataset_name": __file__}, "error", "is a file. Name its folder"),
        ({"report_to": {}}, "error", "report_to: {} must be null or text or a list"),
        ({"eval_strategy": "epochs"}, "error", "eval_strategy: 'epochs' is not valid. Choices: no, steps, epoch"),
        ({"gradient_accumulation_steps": 0}, "error", "gradient_accumulation_steps=0 must be a whole number"),
        ({"num_train_epochs": 0}, "error", "num_train_epochs=0 must be a finite number above 0, or max_steps above 0: nothing would be trained"),
        ({"learning_rate": 0}, "error", "learning_rate=0 must be a finite number above 0: nothing would be trained"),
        ({"metric_for_best_model": "eval_nope", "eval_strategy": "epoch"}, "error", "metric_for_best_model='eval_nope' is no metric of"),
    ],
    ids=str,
)  # fmt: skip
def test_names_and_values_of_a_trl_file(
    tmp_path: Path, values: dict[str, Any], level: str, message: str
) -> None:
    data = save_data(tmp_path / "data", train=PAIR, test=PAIR)
    here = {"model_name_or_path": str(tmp_path), "dataset_name": str(data)}
    path = tmp_path / "run.yaml"
    own = {**TRL, **here, "output_dir": str(tmp_path), "loss_type": "deft", **values}
    path.write_text(yaml.safe_dump(own))
    found = [each for each in doctor.check_yaml(path) if each.level != "ok"]
    assert [each.level for each in found] == [level]
    assert message in found[0].text
    right = {key: value for key, value in own.items() if key not in values}
    path.write_text(yaml.safe_dump({**right, **here}))
    assert [each.level for each in doctor.check_yaml(path)] == ["ok"]


UNTEACHABLE = {
    "no split to test on": ({"train": PAIR}, {"eval_strategy": "epoch"}, "--dataset_name {data!r} has no split 'test'. Add it (test.jsonl in a folder)"),
    "no split to train on": ({"test": PAIR}, {}, "--dataset_name {data!r} has no split 'train'. Add it (train.jsonl in a folder)"),
    "other columns": ({"train": '{"question": "So?", "answer": "No"}'}, {}, "train_dataset has the columns question, answer. Needed are prompt and completion"),
    "two kinds of columns": ({"train": PAIR, "test": '{"answer": "No"}'}, {}, "--dataset_name {data!r} cannot be read: CastError: Couldn't cast answer: string"),
    "nothing said to test on": (
        {"train": '{"messages": [{"role": "user", "content": "So?"}]}', "test": '{"messages": []}'},
        {"eval_strategy": "steps"},
        "eval_dataset: the column messages holds [] (list), and a list of messages with role and content is needed.",
    ),
    "another column of text": ({"train": '{"text": "So?"}'}, {"dataset_text_field": "body"}, "train_dataset has the columns text. Needed are prompt and completion, messages, conversations, body"),
    "a broken line": ({"train": '{"prompt": "So'}, {}, "--dataset_name {data!r} cannot be read: {data}/train.jsonl, line 1 is no JSON"),
    "an empty file": ({"train": ""}, {}, "--dataset_name {data!r} cannot be read: a file has no rows."),
    "no file": ({}, {}, "{data} doesn't contain any data files"),
}  # fmt: skip


@pytest.mark.parametrize("loss_type", ["deft", "nll"])
@pytest.mark.parametrize(("files", "keys", "message"), UNTEACHABLE.values(), ids=UNTEACHABLE)
def test_data_in_a_folder_are_refused_as_the_command_refuses_them(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    files: dict[str, str],
    keys: dict[str, Any],
    message: str,
    loss_type: str,
) -> None:
    data = save_data(tmp_path / "data", **files)
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    values = {**TRL, "model_name_or_path": str(tmp_path / "model"), "dataset_name": str(data)}
    values |= {"output_dir": str(tmp_path / "out"), "loss_type": loss_type, **keys}
    (error,) = errors_of(tmp_path / "run.yaml", **values)
    assert message.format(data=str(data)) in error
    with pytest.raises(SystemExit):
        cli.main(["sft", "--config", str(tmp_path / "run.yaml")])
    assert error in capsys.readouterr().err


def test_a_stream_reads_the_splits_that_it_needs_alone(tmp_path: Path) -> None:
    data = save_data(tmp_path / "data", train=PAIR, test="")
    own = {**TRL, "model_name_or_path": str(tmp_path), "dataset_name": str(data)}
    own |= {"output_dir": str(tmp_path), "loss_type": "deft", "eval_strategy": "no"}
    (error,) = errors_of(tmp_path / "run.yaml", **own)
    assert "a file has no rows" in error
    assert not errors_of(tmp_path / "run.yaml", **own, dataset_streaming=True)
    own |= {"eval_strategy": "epoch", "dataset_streaming": True}
    (error,) = errors_of(tmp_path / "run.yaml", **own)
    assert "a file has no rows" in error


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset_name": None}, "--dataset_name is missing."),
        ({"resume_from_checkpoint": "nowhere"}, "the folder 'nowhere' does not exist."),
        ({"dataset_test_split": None}, "--dataset_test_split None is no text."),
        ({"num_processes": 2}, "unknown key 'num_processes', which `deft sft` refuses."),
    ],
    ids=str,
)
def test_what_the_command_refuses_before_it_loads_anything(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    data = save_data(tmp_path / "data", train=PAIR, test=PAIR)
    own = {**TRL, "model_name_or_path": str(tmp_path), "dataset_name": str(data)}
    own |= {"output_dir": str(tmp_path), "loss_type": "deft", **keys}
    (error,) = errors_of(tmp_path / "run.yaml", **own)
    assert message in error
    with pytest.raises(SystemExit):
        cli.main(["sft", "--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    "keys",
    [
        {"eval_strategy": "no"},
        {"dataset_train_split": "test"},
        {"dataset_text_field": "answer"},
        {"dataset_kwargs": {"skip_prepare_dataset": True}, "dataset_text_field": "body"},
    ],
    ids=str,
)
def test_data_in_a_folder_that_the_command_takes_are_fine(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    row = '{"answer": "No"}' if "dataset_text_field" in keys else PAIR
    data = save_data(tmp_path / "data", train=row, test=row)
    path = tmp_path / "run.yaml"
    own = {**TRL, "model_name_or_path": str(tmp_path), "dataset_name": str(data), **keys}
    path.write_text(yaml.safe_dump({**own, "output_dir": str(tmp_path), "loss_type": "deft"}))
    (finding,) = doctor.check_yaml(path)
    assert finding.level == "ok"
    assert finding.text.endswith("under `deft sft`")


@pytest.mark.parametrize(
    ("keys", "unseen"),
    [
        ({"model_name_or_path": "owner/name", "dataset_name": "owner/data"}, "; model and data were not looked at"),
        ({"model_name_or_path": "owner/name"}, "; model was not looked at"),
        ({"dataset_name": "owner/data"}, "; data were not looked at"),
        ({"datasets": [{"path": "json", "data_files": __file__}]}, "; data were not looked at"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("loss_type", ["deft", "nll"])
def test_what_is_not_here_is_said_not_to_be_looked_at(
    tmp_path: Path, loss_type: str, keys: dict[str, Any], unseen: str
) -> None:
    data = save_data(tmp_path / "data", train=PAIR)
    path = tmp_path / "run.yaml"
    own = {**TRL, "model_name_or_path": str(tmp_path), "dataset_name": str(data), **keys}
    path.write_text(yaml.safe_dump({**own, "output_dir": str(tmp_path), "loss_type": loss_type}))
    *_, last = doctor.check_yaml(path)
    assert last.level != "error"
    assert last.text.endswith(unseen)


@pytest.mark.parametrize(
    "data_files", [__file__, f"{Path(__file__).parent}/*.py", "hf://datasets/a/b"]
)
def test_a_reader_of_files_is_no_name_on_the_hub(tmp_path: Path, data_files: str) -> None:
    own = {**TRL, "model_name_or_path": str(tmp_path), "output_dir": str(tmp_path)}
    del own["dataset_name"]
    path = tmp_path / "run.yaml"
    datasets = [{"path": "text", "data_files": data_files}]
    path.write_text(yaml.safe_dump({**own, "loss_type": "deft", "datasets": datasets}))
    assert [each.level for each in doctor.check_yaml(path)] == ["ok"]


@pytest.mark.parametrize("path", ["triton", "quack"])
def test_a_path_that_cannot_run_here_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    values = {"loss_type": "deft", "loss_kwargs": {"path": path}}
    (error,) = errors_of(tmp_path / "run.yaml", **TRL, output_dir=str(tmp_path), **values)
    assert f"On this machine, path='{path}' cannot run" in error


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"base_model: \xff\xe9")
    (finding,) = doctor.check_yaml(path)
    assert finding.level == "error"
    assert "cannot be read" in finding.text


@pytest.mark.skipif(find_spec("axolotl") is not None, reason="axolotl is installed")
def test_an_axolotl_file_where_axolotl_is_not_installed_is_an_error(tmp_path: Path) -> None:
    (error,) = errors_of(tmp_path / "run.yaml", base_model="not-loaded")
    assert "axolotl is not installed" in error
