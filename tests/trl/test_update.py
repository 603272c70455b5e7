"""The logged loss and the update of a step are those of the formula, however the step is split up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deft_plugin import TokenStatistics, objective, objective_names
from deft_plugin.trl.config import HAS_FUSED_HEAD
from tests.tiny import tiny_model
from tests.trl.running import LEARNING_RATE, config, make_trainer
from tests.updates import (
    assert_same_update,
    formula_mean,
    gradient_update,
    label_logits,
    logged,
    make_rows,
    qwen3,
    update_of,
)

FIXED = {"scope": "fixed", "mean_probability": 0.6}
UNCOUPLED: list[tuple[str, dict[str, Any]]] = [
    ("p", {}),
    ("alpha", {}),
    ("eaft", {}),
    ("cayley", {}),
    ("cayley_trans", FIXED),
    ("deft", {}),
]
WITH_PARAMETERS: list[tuple[str, dict[str, Any]]] = [
    ("alpha", {"a": 0.0}),
    ("eaft", {"k": 3, "normalizer": 1.0, "exponent": 2.0}),
    ("eaft", {"entropy": "full", "exponent": 0.5}),
    ("cayley_trans", {"floor_coefficient": 0.9}),
    ("cayley_trans", {"minimum": 0.5}),
]


def test_every_objective_that_is_not_trls_own_is_tested_here() -> None:
    assert {name for name, _ in UNCOUPLED} >= set(objective_names()) - {"nll", "dft"}


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize(("name", "parameters"), UNCOUPLED, ids=[name for name, _ in UNCOUPLED])
def test_step_is_that_of_the_formula_however_it_is_split_into_micro_batches(
    tmp_path: Path, name: str, parameters: dict[str, Any], batch: int, accumulation: int
) -> None:
    assert_step_is_that_of_the_formula(
        tmp_path,
        name,
        parameters,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )


@pytest.mark.parametrize(("name", "parameters"), WITH_PARAMETERS, ids=str)
def test_parameters_reach_the_objective(
    tmp_path: Path, name: str, parameters: dict[str, Any]
) -> None:
    assert_step_is_that_of_the_formula(tmp_path, name, parameters, per_device_train_batch_size=8)


def assert_step_is_that_of_the_formula(
    output_dir: Path, name: str, parameters: dict[str, Any], **options: Any
) -> None:
    rows = make_rows(8)
    trainer = make_trainer(
        config(output_dir, loss_type=name, loss_kwargs=parameters, **options), rows
    )
    in_formula = {key: value for key, value in parameters.items() if key != "scope"}
    model = qwen3()
    loss = formula_mean(model, rows, name, **in_formula)
    update = update_of(trainer.model, trainer.train)
    assert_same_update(update, gradient_update(model, loss, LEARNING_RATE), tolerance=1e-10)
    # Trainer sums the losses that it logs in float32.
    assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-6)]


@pytest.mark.usefixtures("own_objectives")
def test_own_objective_trains_by_its_name(tmp_path: Path) -> None:
    @objective("focal", couples_tokens=False)
    def focal(log_p: Tensor, statistics: TokenStatistics, *, gamma: float = 2.0) -> Tensor:
        return -((1 - log_p.exp()) ** gamma) * log_p

    rows = make_rows(4)
    trainer = make_trainer(config(tmp_path, loss_type="focal", loss_kwargs={"gamma": 1.5}), rows)
    model = qwen3()
    logits, targets = label_logits(model, rows)
    log_p = logits.log_softmax(1)[torch.arange(len(targets)), targets]
    loss = (-((1 - log_p.exp()) ** 1.5) * log_p).mean()
    update = update_of(trainer.model, trainer.train)
    assert_same_update(update, gradient_update(model, loss, LEARNING_RATE), tolerance=1e-10)


def test_a_step_is_one_pass_through_the_model_and_none_through_the_lm_head(tmp_path: Path) -> None:
    trainer = make_trainer(config(tmp_path), make_rows(4))
    calls, rows = count_calls(trainer.model.model), []
    trainer.model.lm_head.register_forward_hook(
        lambda module, inputs, output: rows.append(output.shape[:-1].numel())
    )
    trainer.train()
    assert len(calls) == 1
    # Whether the hook changes logits has been tried on four rows.
    assert sum(rows) == 4


def count_calls(module: nn.Module) -> list[None]:
    """A list that grows with every call of `module`."""
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


def test_model_that_takes_no_num_items_in_batch_is_normalised_by_the_step_too(
    tmp_path: Path,
) -> None:
    model = qwen3()
    model.accepts_loss_kwargs = False
    rows = make_rows(4)
    args = config(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer = make_trainer(args, rows, model)
    reference = qwen3()
    loss = formula_mean(reference, rows, "deft")
    update = update_of(trainer.model, trainer.train)
    assert_same_update(update, gradient_update(reference, loss, LEARNING_RATE), tolerance=1e-10)


def test_micro_batch_without_labels_adds_nothing(tmp_path: Path) -> None:
    rows = make_rows(3)
    masked = {"input_ids": [7, 8, 9], "labels": [9, -100, -100]}
    args = config(
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        # TRL would drop the row.
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = make_trainer(args, [*rows, masked])
    model = qwen3()
    update = update_of(trainer.model, trainer.train)
    loss = formula_mean(model, rows, "deft")
    assert_same_update(update, gradient_update(model, loss, LEARNING_RATE), tolerance=1e-10)


def test_bfloat16_as_trl_trains_by_default_is_close_to_float32(tmp_path: Path) -> None:
    rows = make_rows(4)
    updates = [
        update_of(trainer.model, trainer.train)
        for bf16 in (False, None)
        for trainer in [make_trainer(config(tmp_path, bf16=bf16), rows, qwen3().float())]
    ]
    assert_same_update(updates[1], updates[0], tolerance=0.05)


def test_auxiliary_loss_of_experts_is_kept_with_trls_coefficient(tmp_path: Path) -> None:
    rows = make_rows(4)

    def update(loss_type: str, coefficient: float) -> dict[str, Tensor]:
        model = tiny_model("qwen3_moe", initializer_range=0.08)
        args = config(tmp_path, loss_type=loss_type, router_aux_loss_coef=coefficient)
        if loss_type == "alpha":
            # An objective that is nll, which TRL computes itself.
            args.loss_kwargs = {"a": 0.0}
        trainer = make_trainer(args, rows, model)
        return update_of(model, trainer.train)

    # Under 1.9's nll the model's own coefficient counts, whatever the argument.
    trls = "nll" if HAS_FUSED_HEAD else "chunked_nll"
    with_auxiliary, without = update(trls, 0.5), update(trls, 0.0)
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(with_auxiliary[gate], without[gate], rtol=0.1)
    assert_same_update(update("alpha", 0.5), with_auxiliary, tolerance=1e-5)
    assert_same_update(update("alpha", 0.0), without, tolerance=1e-5)
