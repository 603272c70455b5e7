"""`deft doctor` finds in an Axolotl YAML what Axolotl itself would pass over."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deft_plugin import doctor
from deft_plugin.doctor import Finding, check_yaml

from .running import PLUGIN, configuration

DIFFUSION = "axolotl.integrations.diffusion.DiffusionPlugin"


def findings(tmp_path: Path, overrides: dict[Any, Any]) -> list[Finding]:
    """What the doctor says of a configuration with these keys."""
    path = tmp_path / "run.yaml"
    values = {**configuration(Path("not-loaded"), tmp_path), **overrides}
    values = {key: value for key, value in values.items() if value is not None}
    path.write_text(yaml.safe_dump(values))
    return list(check_yaml(path))


def test_a_valid_file_is_told_with_its_objective(tmp_path: Path) -> None:
    block = {"scope": "fixed", "mean_probability": 0.25, "tile_rows": 64}
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
        ({"micro_batch_size": "many"}, "micro_batch_size"),
        ({"learning_rte": 0.1}, "'learning_rte'"),
        ({"plugins": [PLUGIN, DIFFUSION]}, "brings a trainer of its own"),
        ({"plugins": f"{PLUGIN}"}, "is not a list of names"),
        ({"plugins": [PLUGIN, 3]}, "is not a list of names"),
        ({7: "x"}, "keys that are no text: [7]"),
    ],
)
def test_what_would_train_something_else_is_an_error(
    tmp_path: Path, keys: dict[Any, Any], message: str
) -> None:
    errors = [found.text for found in findings(tmp_path, keys) if found.level == "error"]
    assert len(errors) == 1
    assert message in errors[0]


def test_deepspeed_needs_its_file_and_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [found.text for found in findings(tmp_path, {"deepspeed": "no_such_file.json"})]
    assert any("deepspeed: no_such_file.json cannot be read" in text for text in texts)
    monkeypatch.setattr(doctor, "_installed", lambda name: name != "deepspeed")
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
