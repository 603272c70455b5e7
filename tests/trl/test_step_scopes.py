"""`cayley_trans` with scope "global" or "ema": the floor of a step does not depend on how the step is split."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from deft_plugin.step_mean import DEFAULT_DECAY
from tests.tiny import tiny_model
from tests.trl.running import LEARNING_RATE, config, make_trainer
from tests.trl.test_update import assert_step_is_that_of_the_formula, count_calls
from tests.updates import (
    assert_same_update,
    formula_mean,
    label_logits,
    logged,
    make_rows,
    qwen3,
    update_of,
)

SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def arguments(output_dir: Path, scope: str, **options: Any) -> Any:
    return config(output_dir, loss_type="cayley_trans", loss_kwargs={"scope": scope}, **options)


def step_mean(trainer: Any) -> Any:
    return trainer._gating.step_mean


@pytest.mark.parametrize(("batch", "accumulation"), SPLITS)
@pytest.mark.parametrize("scope", ["global", "ema"])
def test_first_step_has_the_mean_over_all_its_tokens(
    tmp_path: Path, scope: str, batch: int, accumulation: int
) -> None:
    assert_step_is_that_of_the_formula(
        tmp_path,
        "cayley_trans",
        {"scope": scope},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )


@pytest.mark.parametrize(("batch", "accumulation"), SPLITS)
@pytest.mark.parametrize(
    ("parameters", "decay"),
    [({}, DEFAULT_DECAY), ({"scope": "ema"}, DEFAULT_DECAY), ({"scope": "ema", "decay": 0.5}, 0.5)],
    ids=str,
)
def test_running_mean_is_over_the_steps_before(
    tmp_path: Path, batch: int, accumulation: int, parameters: dict[str, Any], decay: float
) -> None:
    rows = make_rows(8)
    args = config(
        tmp_path,
        loss_type="cayley_trans",
        loss_kwargs=parameters,
        max_steps=3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    trainer = make_trainer(args, rows)
    actual = update_of(trainer.model, trainer.train)

    model = qwen3()
    running: float | None = None
    losses = []

    def train() -> None:
        nonlocal running
        for _ in range(3):
            logits, targets = label_logits(model, rows)
            mean = logits.detach().softmax(1)[torch.arange(len(targets)), targets].mean().item()
            floor = mean if running is None else running
            loss = formula_mean(model, rows, "cayley_trans", mean_probability=floor)
            losses.append(loss.item())
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= LEARNING_RATE * parameter.grad
                    parameter.grad = None
            running = mean if running is None else decay * running + (1 - decay) * mean

    # Three steps of a model whose norms are in float32.
    assert_same_update(actual, update_of(model, train), tolerance=1e-6)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)
    assert step_mean(trainer).mean == pytest.approx(running, rel=1e-6)


@pytest.mark.parametrize(
    ("scope", "batch", "accumulation", "passes"),
    [("global", 8, 1, 3), ("global", 4, 2, 12), ("ema", 8, 1, 4), ("ema", 4, 2, 8)],
)
def test_what_a_scope_costs_in_forward_passes_over_three_steps(
    tmp_path: Path, scope: str, batch: int, accumulation: int, passes: int
) -> None:
    args = arguments(
        tmp_path,
        scope,
        max_steps=3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    trainer = make_trainer(args, make_rows(8))
    calls = count_calls(trainer.model.model)
    trainer.train()
    assert len(calls) == passes


def test_looking_ahead_sees_the_dropout_that_training_will_draw(tmp_path: Path) -> None:
    model = tiny_model("qwen3", attention_dropout=0.5, initializer_range=0.3).double()
    args = arguments(
        tmp_path, "global", per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    trainer = make_trainer(args, make_rows(4), model=model)
    used = []
    training_step = trainer.training_step

    def record(*args: Any, **kwargs: Any) -> Any:
        used.append(trainer._gating.head.objective.mean_probability)
        return training_step(*args, **kwargs)

    trainer.training_step = record
    trainer.train()
    assert used[0] == used[1]
    # Counted in the passes that trained.
    assert used[0] == pytest.approx(step_mean(trainer).mean, rel=1e-12)


@pytest.mark.parametrize("scope", ["global", "ema"])
def test_an_evaluation_uses_the_mean_of_the_last_step_and_changes_nothing(
    tmp_path: Path, scope: str
) -> None:
    rows = make_rows(8)
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    plain = make_trainer(arguments(tmp_path, scope, **options), rows)
    expected = update_of(plain.model, plain.train)
    args = arguments(tmp_path, scope, eval_strategy="steps", eval_steps=1, **options)
    trainer = make_trainer(args, rows, eval_dataset=plain.train_dataset)
    actual = update_of(trainer.model, trainer.train)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

    mean = step_mean(trainer).mean
    loss = formula_mean(trainer.model.eval(), rows, "cayley_trans", mean_probability=mean)
    assert trainer.evaluate()["eval_objective_loss"] == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize("scope", ["global", "ema"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path, scope: str) -> None:
    rows = make_rows(12)
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
    }
    whole = make_trainer(arguments(tmp_path, scope, **options), rows)
    expected = update_of(whole.model, whole.train)
    checkpoint = tmp_path / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert 0 < state["stateful_callbacks"]["deft_plugin"]["mean"] < 1

    resumed = make_trainer(arguments(tmp_path, scope, **options), rows)
    actual = update_of(resumed.model, lambda: resumed.train(resume_from_checkpoint=str(checkpoint)))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert step_mean(resumed).mean == step_mean(whole).mean


def test_training_again_begins_anew(tmp_path: Path) -> None:
    trainer = make_trainer(arguments(tmp_path, "ema", learning_rate=0.0), make_rows(4))
    trainer.train()
    first = step_mean(trainer).mean
    step_mean(trainer).mean = 0.9
    trainer.train()
    assert step_mean(trainer).mean == pytest.approx(first, rel=1e-12)


@pytest.mark.parametrize("scope", ["global", "ema"])
def test_resuming_with_restored_callbacks_works(tmp_path: Path, scope: str) -> None:
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "restore_callback_states_from_checkpoint": True,
    }
    whole = make_trainer(arguments(tmp_path, scope, **options), make_rows(4))
    whole.train()
    resumed = make_trainer(arguments(tmp_path, scope, **options), make_rows(4))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert step_mean(resumed).mean == step_mean(whole).mean


def test_a_step_of_nan_is_shown_by_its_loss_and_left_out_of_the_running_mean(
    tmp_path: Path,
) -> None:
    args = arguments(tmp_path, "ema", max_steps=3, learning_rate=0.0, logging_nan_inf_filter=False)
    trainer = make_trainer(args, make_rows(4))
    norm = trainer.model.model.norm.weight
    training_step, steps = trainer.training_step, []

    def second_is_nan(*arguments: Any, **kwargs: Any) -> Any:
        steps.append(None)
        scale = norm.detach().clone()
        if len(steps) == 2:
            norm.data.fill_(float("nan"))
        loss = training_step(*arguments, **kwargs)
        norm.data.copy_(scale)
        # As a loss scaler would, or the parameters would be NaN from here on.
        trainer.model.zero_grad()
        return loss

    trainer.training_step = second_is_nan
    trainer.train()
    losses = logged(trainer, "objective_loss")
    assert [math.isnan(loss) for loss in losses] == [False, True, False]
    assert 0 < step_mean(trainer).mean < 1
