"""A step's update is that of the formula on full logits, however Axolotl splits the step up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axolotl.core.trainers import AxolotlTrainer
from datasets import Dataset
from transformers import AutoModelForCausalLM

from deft_plugin.axolotl.trainer import DEFTTrainer
from deft_plugin.trl import SFTConfig, SFTTrainer
from tests.tiny import tiny_tokenizer
from tests.updates import (
    Rows,
    Update,
    assert_same_update,
    formula_mean,
    gradient_update,
    make_rows,
    update_of,
)

from .running import configuration, make_trainer

# One step of SGD is linear: a large one stands out from the rounding of the weights.
LEARNING_RATE = 100.0
TOLERANCE = 2e-5


def train(values: dict[str, Any], rows: Rows) -> tuple[Any, Update]:
    """The trainer after training, and what training did to the model."""
    trainer = make_trainer(values, rows)
    return trainer, update_of(trainer.model, trainer.train)


def formula_update(base_model: Path, rows: Rows, objective: str) -> Update:
    """What a step on the mean over all labels does, by the formula on full logits."""
    model = AutoModelForCausalLM.from_pretrained(base_model)
    return gradient_update(model, formula_mean(model, rows, objective), LEARNING_RATE)


@pytest.mark.parametrize(("micro_batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize(
    ("objective", "parameters"),
    [("deft", {}), ("p", {}), ("nll", {}), ("cayley_trans", {"scope": "global"})],
    ids=["deft", "p", "nll", "cayley_trans-global"],
)
def test_update_is_that_of_the_formula_however_the_step_is_split(
    base_model: Path,
    tmp_path: Path,
    objective: str,
    parameters: dict[str, Any],
    micro_batch_size: int,
    accumulation: int,
) -> None:
    rows = make_rows(4)
    values = configuration(
        base_model,
        tmp_path,
        deft_objective=objective,
        deft=parameters,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
    )
    _, update = train(values, rows)
    assert_same_update(update, formula_update(base_model, rows, objective), TOLERANCE)


def test_update_is_that_of_the_trl_adapter(base_model: Path, tmp_path: Path) -> None:
    rows = make_rows(4)
    values = configuration(base_model, tmp_path, micro_batch_size=2, gradient_accumulation_steps=2)
    _, update = train(values, rows)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_model),
        args=SFTConfig(
            loss_type="deft",
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=1,
            optim="sgd",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    assert_same_update(update, update_of(trainer.model, trainer.train), TOLERANCE)


@pytest.mark.parametrize("checkpointing", [None, True])
def test_packing_and_checkpointing_leave_the_update_as_it_is(
    base_model: Path, tmp_path: Path, checkpointing: bool | None
) -> None:
    rows = make_rows(4)
    packed = [
        {**row, "position_ids": list(range(len(row["input_ids"]))), "length": len(row["input_ids"])}
        for row in rows
    ]
    values = configuration(
        base_model,
        tmp_path,
        sample_packing=True,
        attn_implementation="sdpa",
        micro_batch_size=1,
        sequence_len=96,
        gradient_checkpointing=checkpointing,
    )
    _, update = train(values, packed)
    assert_same_update(update, formula_update(base_model, rows, "deft"), TOLERANCE)


def test_nll_logs_the_losses_of_axolotl_without_the_plugin(
    base_model: Path, tmp_path: Path
) -> None:
    rows = make_rows(12)

    def losses(trainer_class: type, **overrides: Any) -> list[float]:
        values = configuration(base_model, tmp_path, max_steps=3, learning_rate=0.01, **overrides)
        trainer, _ = train(values, rows)
        assert type(trainer) is trainer_class
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    with_plugin = losses(DEFTTrainer, deft_objective="nll")
    without = losses(AxolotlTrainer, plugins=None)
    assert len(without) == 3
    assert with_plugin == pytest.approx(without, abs=1e-5)
