"""PEFT's DEFT, an adapter of the same name as this package's loss, is told apart from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml

from deft_plugin import cli
from deft_plugin.doctor import check_path
from deft_plugin.doctor.adapters import notes_on_peft_deft
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("trl_as_it_was")

OTHER = "is PEFT's Decompositional Efficient Fine-Tuning, a kind of adapter, and not this package's loss"


def save_adapter(folder: Path, kind: str) -> Path:
    """An adapter as PEFT saves it."""
    if not hasattr(peft, kind):
        pytest.skip(f"PEFT {peft.__version__} has no {kind}")
    config = getattr(peft, kind)(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("place", ["", "adapter_config.json"])
def test_an_adapter_of_pefts_deft_is_not_the_loss(tmp_path: Path, place: str) -> None:
    folder = save_adapter(tmp_path / "adapter", "DeftConfig")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "DEFT"
    (note,) = check_path(folder / place)
    assert note.level == "note"
    assert OTHER in note.text


def test_another_adapter_is_named_by_its_kind(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", "LoraConfig")
    untold = "; its folder does not say which loss it was trained with"
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, named in (("owner/name", " for 'owner/name'"), (None, "")):
        config["base_model_name_or_path"] = base
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (finding,) = check_path(folder)
        assert finding.level == "ok"
        assert finding.text == f"LORA adapter{named}{untold}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is a folder without adapter_config.json"),
        ("{", "adapter_config.json cannot be read"),
        ("[]", "has no peft_type"),
        ("[" * 100_000, "adapter_config.json cannot be read"),
    ],
    ids=["absent", "torn", "a list", "deep"],
)
def test_a_folder_that_is_no_adapter_is_an_error(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    (error,) = check_path(tmp_path)
    assert error.level == "error"
    assert message in error.text


@pytest.mark.parametrize(
    ("values", "beside"),
    [
        ({"peft_type": "DEFT", "loss_type": "deft"}, "loss_type: deft is the loss, and neither needs the other"),
        ({"peft": {"peft_type": "deft"}, "loss_type": "deft"}, "loss_type: deft is the loss"),
        ({"adapter": "deft", "deft_objective": "deft"}, "deft_objective: deft is the loss"),
        ({"peft_type": "DEFT"}, "which is loss_type: deft (TRL) or deft_objective: deft (Axolotl)"),
    ],
    ids=str,
)  # fmt: skip
def test_a_yaml_that_names_both_is_told_which_is_which(values: dict[str, Any], beside: str) -> None:
    (note,) = notes_on_peft_deft(values)
    assert note.level == "note"
    assert OTHER in note.text
    assert beside in note.text


def test_a_yaml_of_the_loss_alone_says_nothing_of_it(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", "LoraConfig")
    values = {"loss_type": "deft", "adapter": "qlora", "lora_model_dir": str(folder)}
    # A YAML may hold itself.
    values["more"] = values
    assert not [*notes_on_peft_deft(values)]


def test_a_folder_that_a_yaml_names_is_looked_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_adapter(tmp_path / "adapter", "DeftConfig")
    path = tmp_path / "run.yaml"
    values = {"model_name_or_path": str(folder), "dataset_name": "d", "loss_type": "deft"}
    path.write_text(
        yaml.safe_dump({**values, "use_cpu": True, "bf16": False, "output_dir": str(tmp_path)})
    )
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", str(path), str(folder)])
    assert not end.value.code
    said = capsys.readouterr().out
    assert f"note   model_name_or_path: {folder} has peft_type: DEFT, which {OTHER}" in said
    assert said.count(OTHER) == 2
