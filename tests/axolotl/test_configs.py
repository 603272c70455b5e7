"""Every ready YAML passes Axolotl's own schema, has no key that Axolotl would ignore, and says what it claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deft_plugin.doctor.axolotl_keys import unknown_keys

from .running import CPU, GPU, PLUGIN, validate

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "axolotl_configs").glob("*.yaml"))
PAPER = [path for path in CONFIGS if path.stem.startswith("paper")]


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def test_there_is_one_for_each_setup() -> None:
    assert {path.stem for path in CONFIGS} == {
        "local",
        "qlora-llama-3.1-8b",
        "qlora-qwen3-8b",
        "lora-qwen3-8b",
        "full-zero2",
        "full-zero3",
        "full-fsdp2",
        *(
            f"paper-{data}-{objective}"
            for data in ("math", "medical", "figfont")
            for objective in ("deft", "cayley_trans")
        ),
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_valid_and_none_of_its_keys_is_ignored(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    values = load(path)
    eight = {**GPU, "n_gpu": 8}
    cfg = validate(
        load(path),
        CPU if path.stem == "local" else eight if "deepspeed" in values else GPU,
    )
    assert PLUGIN in cfg.plugins
    assert cfg.deft_objective == ("cayley_trans" if "cayley" in path.stem else "deft")
    assert list(unknown_keys(values)) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_files_it_names_are_in_the_repository_or_made_by_a_script(path: Path) -> None:
    values = load(path)
    if "deepspeed" in values:
        assert (ROOT / values["deepspeed"]).is_file()
    for dataset in values["datasets"] + values.get("test_datasets", []):
        if dataset.get("ds_type") == "json" and not dataset["path"].startswith("data/"):
            assert (ROOT / dataset["path"]).is_file()
    assert f"axolotl train axolotl_configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_setups_have_its_hyper_parameters(path: Path) -> None:
    values = load(path)
    math = "math" in path.stem
    common = {
        "num_epochs": 1,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "learning_rate": 2e-5,
        "bf16": True,
        "sample_packing": False,
        "sequence_len": 3072 if math else 800,
        "micro_batch_size": 4 if math else 16,
        "weight_decay": 1e-5 if "figfont" in path.stem else 0.01,
    }
    assert {key: values[key] for key in common} == common
    assert "adapter" not in values
    assert values["micro_batch_size"] * values["gradient_accumulation_steps"] * 8 == 256
    assert values["max_grad_norm"] == 1 / values["gradient_accumulation_steps"]
