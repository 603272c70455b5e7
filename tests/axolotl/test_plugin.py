"""The plugin says what it does in one line, and whatever keeps it from doing that stops the run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.loaders import ModelLoader
from axolotl.utils.dict import DictDefault
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from deft_plugin import build_objective, gated_head_of
from deft_plugin.axolotl import DEFTPlugin
from deft_plugin.ops import CoreSettings
from tests.tiny import tiny_model, tiny_tokenizer
from tests.updates import formula_mean, make_rows

from .running import LORA, PLUGIN, QLORA, configuration, make_trainer, validate


class OtherTrainerPlugin(BasePlugin):
    """A plugin with a trainer of its own, as distillation has."""

    def get_trainer_cls(self, cfg: DictDefault) -> type[AxolotlTrainer]:
        return AxolotlTrainer


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({}, ["DEFT()", "Qwen3ForCausalLM", "trainable lm_head", "path chunked", "1 rank"]),
        (
            {"deft_objective": "alpha", "deft": {"a": 0.25, "path": "reference"}, **LORA},
            ["a=0.25", "frozen lm_head", "path reference"],
        ),
        (
            {**LORA, "lora_modules_to_save": ["lm_head"]},
            ["DEFT()", "trainable lm_head"],
        ),
    ],
    ids=["full", "lora", "lora-lm_head"],
)
def test_one_line_names_objective_head_and_path(
    base_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: dict[str, Any],
    named: list[str],
) -> None:
    make_trainer(configuration(base_model, tmp_path, **overrides), make_rows(4))
    lines = [line for line in capsys.readouterr().out.splitlines() if "objective" in line]
    assert len(lines) == 1
    assert lines[0].startswith("deft_plugin: ")
    assert [text for text in named if text not in lines[0]] == []


@pytest.mark.parametrize("overrides", [{}, LORA, QLORA], ids=["full", "lora", "qlora"])
def test_training_lowers_the_loss(
    base_model: Path, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    values = configuration(
        base_model,
        tmp_path,
        max_steps=12,
        num_epochs=12,
        optimizer="adamw_torch",
        learning_rate=0.02,
        deft_objective="nll",
        **overrides,
    )
    trainer = make_trainer(values, make_rows(4))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("other_first", [True, False])
def test_a_plugin_with_a_trainer_of_its_own_is_refused_before_the_model_loads(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_first: bool
) -> None:
    other = f"{__name__}.OtherTrainerPlugin"
    plugins = [other, PLUGIN] if other_first else [PLUGIN, other]
    values = configuration(base_model, tmp_path, plugins=plugins)
    monkeypatch.delattr(ModelLoader, "_build_model")
    with pytest.raises(ValueError, match="OtherTrainerPlugin brings a trainer"):
        make_trainer(values, make_rows(4))


def test_a_trainer_of_another_class_stops_the_run() -> None:
    cfg = validate(configuration(Path("a"), Path("b")))
    trainer = object.__new__(AxolotlTrainer)
    with pytest.raises(RuntimeError, match="AxolotlTrainer, not the DEFTTrainer"):
        PluginManager.get_instance().add_callbacks_post_trainer(cfg, trainer)


def _lose_head(trainer: Any) -> None:
    head = gated_head_of(trainer.model)
    assert head is not None
    head.remove()


def _set_loss_function(trainer: Any) -> None:
    trainer.compute_loss_func = lambda outputs, labels, **_: outputs["loss"]


def _smooth_labels(trainer: Any) -> None:
    trainer.label_smoother = object()


def _count_on_one_rank(trainer: Any) -> None:
    trainer.args.average_tokens_across_devices = False


def _keep_count_to_itself(trainer: Any) -> None:
    trainer.model_accepts_loss_kwargs = False


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (_lose_head, "lost its gated head"),
        (_set_loss_function, "compute_loss_func"),
        (_smooth_labels, "smooths labels"),
        (_count_on_one_rank, "average_tokens_across_devices"),
        (_keep_count_to_itself, "num_items_in_batch"),
    ],
)
def test_what_changes_the_trainer_afterwards_stops_the_run_before_its_first_step(
    base_model: Path, tmp_path: Path, sabotage: Any, message: str
) -> None:
    trainer = make_trainer(configuration(base_model, tmp_path), make_rows(4))
    sabotage(trainer)
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_loss_that_the_gated_head_did_not_compute_stops_the_run(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(configuration(base_model, tmp_path), make_rows(4))
    own_loss = torch.zeros((), requires_grad=True)
    monkeypatch.setattr(AxolotlTrainer, "compute_loss", lambda *_, **__: own_loss * 1)
    with pytest.raises(RuntimeError, match="not computed by the gated head"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_without_its_plugin_the_trainer_neither_trains_nor_evaluates(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DEFTPlugin, "add_callbacks_post_trainer", lambda *_: [])
    trainer = make_trainer(configuration(base_model, tmp_path), make_rows(4), make_rows(2))
    for start in (trainer.train, trainer.evaluate):
        with pytest.raises(RuntimeError, match="no gated head"):
            start()


def test_several_gpus_in_one_process_are_refused(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(configuration(base_model, tmp_path), make_rows(4))
    monkeypatch.setattr(trainer.args, "_n_gpu", 2)
    with pytest.raises(ValueError, match="one process per GPU"):
        trainer.install(build_objective("deft"), CoreSettings())


def test_a_plugin_that_cannot_be_imported_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("deft_plugin.axolotl")]:
        monkeypatch.delitem(sys.modules, name)
    # What an import finds when a dependency is missing or of another version.
    monkeypatch.setitem(sys.modules, "axolotl.core.trainers", None)
    with pytest.raises(RuntimeError, match="deft doctor"):
        PluginManager.get_instance().register(PLUGIN)


def test_mamba_trains_on_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # flash-linear-attention, which other tests import, registers a Mamba of its own under the same name.
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "mamba", raising=False)
    model = tiny_model("mamba", state_size=4, num_heads=2)
    model.save_pretrained(tmp_path / "mamba")
    tiny_tokenizer().save_pretrained(tmp_path / "mamba")
    rows = make_rows(4)
    trainer = make_trainer(configuration(tmp_path / "mamba", tmp_path), rows)
    trainer.train()
    expected = formula_mean(AutoModelForCausalLM.from_pretrained(tmp_path / "mamba"), rows, "deft")
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
