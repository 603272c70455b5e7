"""`deft doctor` finds in an Axolotl YAML what Axolotl itself would pass over."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deft_plugin.doctor import Finding, check_yaml
from deft_plugin.doctor import axolotl as room

from .running import CUT, DEFINING, LIGER, PLUGIN, configuration

# A folder in the working directory.
HERE = "rows"
DIFFUSION = "axolotl.integrations.diffusion.DiffusionPlugin"


def findings(tmp_path: Path, overrides: dict[Any, Any]) -> list[Finding]:
    """What the doctor says of a configuration with these keys."""
    path = tmp_path / "run.yaml"
    (tmp_path / "rows.jsonl").touch()
    datasets = [{"path": str(tmp_path / "rows.jsonl"), "type": "chat_template"}]
    values = {**configuration(Path("not-loaded"), tmp_path, datasets=datasets), **overrides}
    values = {key: value for key, value in values.items() if value is not None}
    path.write_text(yaml.safe_dump(values))
    return list(check_yaml(path))


def test_a_valid_file_is_told_with_its_objective(tmp_path: Path) -> None:
    block = {"scope": "fixed", "mean_probability": 0.25, "tile_rows": 64, "histograms": True}
    (finding,) = findings(tmp_path, {"deft_objective": "cayley_trans", "deft": block})
    assert finding.level == "ok"
    assert "CayleyTrans" in finding.text
    assert "mean_probability=0.25" in finding.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"plugins": None, "deft_objective": "deft"}, "would train with its own loss"),
        ({"plugins": ["deft_plugin.axolotl.DEFTPlugn"]}, "would train with its own loss"),
        ({"plugins": ["deft_plugn.axolotl.DEFTPlugin"]}, "would train with its own loss"),
        ({"plugins": [PLUGIN, "no_such_package.Plugin"]}, "no_such_package"),
        ({"deft_objective": "dfet"}, "dfet"),
        ({"use_eaft": True}, "use_eaft"),
        ({"deft": {"histograms": "yes"}}, "deft.histograms: 'yes'"),
        ({"micro_batch_size": "many"}, "micro_batch_size"),
        ({"micro_batch_size": "many"}, "'many'"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be a whole number of at least 1"),
        (
            {"learning_rte": 0.1},
            "'learning_rte', which it does not know. Did you mean 'learning_rate'?",
        ),
        ({"plugins": [PLUGIN, DIFFUSION]}, "brings a trainer of its own"),
        ({"plugins": f"{PLUGIN}"}, "is not a list of names"),
        ({"plugins": [PLUGIN, 3]}, "is not a list of names"),
        ({7: "x"}, "keys that are no text: [7]"),
        ({"plugins": [PLUGIN, DEFINING]}, f"{PLUGIN}, {DEFINING} are one plugin"),
        (
            {"deft": {"module": "nowhere_mod"}},
            "module: 'nowhere_mod' cannot be imported (ModuleNotFoundError",
        ),
    ],
)
def test_what_would_train_something_else_is_an_error(
    tmp_path: Path, keys: dict[Any, Any], message: str
) -> None:
    errors = [found.text for found in findings(tmp_path, keys) if found.level == "error"]
    assert len(errors) == 1
    assert message in errors[0]


def test_what_is_switched_off_is_noted_and_the_file_accepted(tmp_path: Path) -> None:
    keys = {"plugins": [PLUGIN, CUT, LIGER], "liger_fused_linear_cross_entropy": True}
    note, ok = findings(tmp_path, keys)
    assert note.level == "note"
    assert "cut_cross_entropy, liger_fused_linear_cross_entropy set to false" in note.text
    assert (ok.level, "trains with DEFT()" in ok.text) == ("ok", True)


@pytest.mark.parametrize("key", ["cut_cross_entropy", "liger_fused_linear_cross_entropy"])
def test_a_cross_entropy_without_its_plugin_is_noted(tmp_path: Path, key: str) -> None:
    note, ok = findings(tmp_path, {key: True})
    assert note.level == "note"
    assert f"{key!r}, which needs its plugin, and the gated head needs neither" in note.text
    assert ok.level == "ok"


def test_the_plugin_may_be_named_by_the_module_that_defines_it(tmp_path: Path) -> None:
    (finding,) = findings(tmp_path, {"plugins": [DEFINING], "deft_objective": "p"})
    assert (finding.level, "LinearProbability" in finding.text) == ("ok", True)
    errors = findings(tmp_path, {"plugins": [DEFINING, DIFFUSION]})
    assert any("brings a trainer of its own" in found.text for found in errors)


@pytest.mark.parametrize("installed", [True, False])
def test_torchvision_is_missed_where_images_are_processed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    found = room.is_installed
    monkeypatch.setattr(
        room, "is_installed", lambda name: installed if name == "torchvision" else found(name)
    )
    *notes, ok = findings(tmp_path, {"processor_type": "AutoProcessor"})
    assert ok.level == "ok"
    assert ['pip install "deft_plugin[vision]"' in note.text for note in notes] == (
        [] if installed else [True]
    )


def test_a_path_that_cannot_run_here_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (error,) = findings(tmp_path, {"deft": {"path": "triton"}})
    assert error.level == "error"
    assert "On this machine, path='triton' cannot run" in error.text


def test_all_that_is_refused_is_told_line_by_line(tmp_path: Path) -> None:
    keys = {"use_eaft": True, "trainer_cls": "transformers.Trainer", "deft_objectiv": "nll"}
    errors = [found.text for found in findings(tmp_path, keys)]
    assert len(errors) == 3
    for key in keys:
        assert sum(f"`{key}: " in text or f"{key!r}" in text for text in errors) == 1


@pytest.mark.parametrize(
    ("dataset", "level", "message"),
    [
        ({"feild_messages": "m"}, "error", "'datasets[0].feild_messages'"),
        ({"feild_messages": "m"}, "error", "Did you mean 'field_messages'?"),
        ({"type": {"feild_output": "o"}}, "error", "'datasets[0].type.feild_output'"),
        ({"zzz": 1}, "note", "'datasets[0].zzz', which it does not know"),
        ({"path": "data/none.jsonl"}, "error", "datasets[0]: data/none.jsonl does not exist"),
        ({"path": "./none"}, "error", "datasets[0]: ./none does not exist"),
        ({"path": "a/folder/none"}, "error", "datasets[0]: a/folder/none does not exist"),
        ({"path": ".", "data_files": ["x.json"]}, "error", "datasets[0]: x.json does not exist"),
        ({"path": "~/rows.jsonl"}, "error", "~/rows.jsonl does not exist (~ is expanded by a shell, not in a YAML file"),
        ({"path": f"{HERE}/none"}, "note", f"datasets[0]: {HERE}/none is no folder here, and is looked for on the hub"),
        ({"path": "owner/name"}, "ok", "trains with"),
        ({"path": "owner/name", "data_files": "x.json"}, "ok", "trains with"),
        ({"path": "json", "data_files": "x.json"}, "error", "datasets[0]: x.json does not exist"),
        ({"path": "csv", "data_files": ["rows.jsonl", "/none"]}, "error", "datasets[0]: /none does not exist"),
        ({"path": "json", "data_files": "rows.jsonl"}, "ok", "trains with"),
        ({"path": "json", "data_files": "*.jsonl"}, "ok", "trains with"),
        ({"path": "https://where.ever/x.jsonl"}, "ok", "trains with"),
        ({"message_property_mappings": {"role": "from"}}, "ok", "trains with"),
    ],
    ids=str,
)  # fmt: skip
def test_nested_keys_and_files_of_data_sets(
    tmp_path: Path,
    dataset: dict[str, Any],
    level: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / HERE).mkdir()
    (tmp_path / "rows.jsonl").touch()
    own = {"path": str(tmp_path / "rows.jsonl"), "type": "chat_template"}
    found = findings(tmp_path, {"datasets": [{**own, **dataset}]})
    assert [level] == [finding.level for finding in found if message in finding.text]
    assert any(finding.level == "error" for finding in found) == (level == "error")


@pytest.mark.parametrize("key", ["test_datasets", "pretraining_dataset"])
def test_files_of_other_data_sets(tmp_path: Path, key: str) -> None:
    own = {"path": "json", "type": "completion", "data_files": [str(tmp_path / "none.jsonl")]}
    alone = (
        {"datasets": None, "max_steps": 1} if key == "pretraining_dataset" else {"val_set_size": 0}
    )
    texts = [found.text for found in findings(tmp_path, {key: [own], **alone})]
    assert texts == [f"{key}[0]: {tmp_path / 'none.jsonl'} does not exist"]


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_model_dir": "./none", "adapter": "lora"},
        {"resume_from_checkpoint": "out/checkpoint-5"},
        {"tokenizer_config": "/none"},
        {"chat_template_jinja": "none.jinja", "chat_template": "jinja"},
    ],
    ids=str,
)
def test_what_else_is_named_is_looked_for(tmp_path: Path, keys: dict[str, str]) -> None:
    (key, path), *_ = keys.items()
    found = findings(tmp_path, {**keys, "lora_target_linear": True})
    texts = [each.text for each in found if each.level == "error"]
    assert texts == [f"{key}: {path} does not exist"]


def test_a_template_is_none_of_a_files_names(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (ok,) = findings(tmp_path, {"chat_template": "jinja", "chat_template_jinja": template})
    assert ok.level == "ok"


@pytest.mark.parametrize("key", ["datasets", "test_datasets", "pretraining_dataset"])
@pytest.mark.parametrize("datasets", ["x", ["x"], {"path": "x"}], ids=str)
def test_datasets_that_are_no_list_of_mappings_are_named(
    tmp_path: Path, key: str, datasets: Any
) -> None:
    (error,) = findings(tmp_path, {key: datasets})
    assert error.level == "error"
    assert error.text == f"{key}: {datasets!r} is not a list of mappings, each with a path"


@pytest.mark.parametrize(
    ("keys", "package"),
    [
        ({"flash_attention": True}, "flash-attn"),
        ({"attn_implementation": "flash_attention_2"}, "flash-attn"),
        ({"attn_implementation": "flash_attention_3"}, "flash-attn-3"),
    ],
    ids=str,
)
@pytest.mark.parametrize("installed", [True, False])
def test_flash_attention_that_is_not_installed_here_is_noted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    package: str,
    installed: bool,
) -> None:
    found = room.is_installed
    monkeypatch.setattr(
        room, "is_installed", lambda name: installed if name == package else found(name)
    )
    *notes, ok = findings(tmp_path, keys)
    assert ok.level == "ok"
    assert [f"may need {package} where it trains" in note.text for note in notes] == (
        [] if installed else [True]
    )


def test_a_base_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (error,) = findings(tmp_path, {"base_model": "./no-such-model"})
    assert error == Finding("error", "base_model: ./no-such-model does not exist")


def test_deepspeed_needs_its_file_and_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [found.text for found in findings(tmp_path, {"deepspeed": "no_such_file.json"})]
    assert any("deepspeed: no_such_file.json cannot be read" in text for text in texts)
    monkeypatch.setattr(room, "is_installed", lambda name: name != "deepspeed")
    zero2 = str(Path(__file__).parents[2] / "deepspeed_configs/zero2.json")
    (error,) = findings(tmp_path, {"deepspeed": zero2})
    assert (error.level, "not installed" in error.text) == ("error", True)


@pytest.mark.usefixtures("own_objectives")
def test_a_module_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "objective_of_the_folder.py").write_text(
        "import deft_plugin\n"
        "@deft_plugin.objective('of_the_folder')\n"
        "def of_the_folder(log_p, statistics):\n"
        "    return -log_p\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    keys = {"deft_objective": "of_the_folder", "deft": {"module": "objective_of_the_folder"}}
    (finding,) = findings(tmp_path, keys)
    assert finding.level == "ok"
    del sys.modules["objective_of_the_folder"]
