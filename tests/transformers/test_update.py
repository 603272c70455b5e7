"""A step of `GatedTrainer` is that of the formula, however it is split up; a run is that of the TRL adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, Trainer

import deft_plugin
from deft_plugin import GatedTrainer, gated_head_of, objective_names
from deft_plugin.trl import SFTTrainer
from tests.tiny import tiny_model
from tests.transformers.running import LEARNING_RATE, arguments, make_trainer
from tests.trl import running as trl
from tests.updates import (
    Update,
    assert_same_update,
    formula_mean,
    gradient_update,
    logged,
    make_rows,
    qwen3,
    update_of,
)

FIXED = {"scope": "fixed", "mean_probability": 0.6}
CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("deft", {}),
    ("nll", {}),
    ("dft", {}),
    ("p", {}),
    ("alpha", {"a": 0.25}),
    ("eaft", {"k": 3, "normalizer": 1.0}),
    ("cayley", {}),
    ("cayley_trans", FIXED),
]
SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]
ADAPTERS: dict[str, Any] = {
    "lora": {"target_modules": "all-linear"},
    "lora-lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "lm_head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def test_every_objective_is_tested_here() -> None:
    assert {name for name, _ in CHOICES} == set(objective_names())


@pytest.mark.parametrize(("name", "parameters"), CHOICES, ids=[name for name, _ in CHOICES])
def test_a_step_is_that_of_the_formula(
    tmp_path: Path, name: str, parameters: dict[str, Any]
) -> None:
    rows = make_rows(8)
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer = make_trainer(args, rows, loss_type=name, loss_kwargs=parameters)
    in_formula = {key: value for key, value in parameters.items() if key != "scope"}
    model = qwen3()
    loss = formula_mean(model, rows, name, **in_formula)
    update = update_of(trainer.model, trainer.train)
    assert_same_update(update, gradient_update(model, loss, LEARNING_RATE), tolerance=1e-10)
    # Trainer sums the losses that it logs in float32.
    assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-6)]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_step_of_an_adapter_is_that_of_the_formula(tmp_path: Path, adapter: str) -> None:
    def adapted() -> Any:
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTERS[adapter])
        return get_peft_model(qwen3(), config).double()

    rows = make_rows(8)
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer = make_trainer(args, rows, adapted())
    model = adapted()
    expected = gradient_update(model, formula_mean(model, rows, "deft"), LEARNING_RATE)
    assert_same_update(update_of(trainer.model, trainer.train), expected, tolerance=1e-10)


@pytest.mark.parametrize(
    ("loss_type", "loss_kwargs"),
    [("deft", {}), ("cayley_trans", {"scope": "ema"}), ("cayley_trans", {"scope": "global"})],
    ids=str,
)
def test_parameters_after_some_steps_do_not_depend_on_how_these_are_split(
    tmp_path: Path, loss_type: str, loss_kwargs: dict[str, Any]
) -> None:
    def run(batch: int, accumulation: int) -> Update:
        args = arguments(
            tmp_path,
            max_steps=4,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=1.0,
        )
        trainer = make_trainer(args, make_rows(20), loss_type=loss_type, loss_kwargs=loss_kwargs)
        update = update_of(trainer.model, trainer.train)
        # 20 rows are two steps and a half.
        assert trainer.state.global_step == 4
        return update

    whole, *others = [run(*split) for split in SPLITS]
    for update in others:
        assert_same_update(update, whole, tolerance=1e-10)


@pytest.mark.parametrize("loss_type", ["deft", "cayley_trans", "eaft"])
def test_a_run_is_that_of_trls_trainer(tmp_path: Path, loss_type: str) -> None:
    rows, eval_rows = make_rows(24), make_rows(5, seed=1)
    options = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    theirs = trl.make_trainer(
        trl.config(tmp_path, loss_type=loss_type, **options),
        rows,
        eval_dataset=trl.as_dataset(eval_rows),
    )
    ours = make_trainer(
        arguments(tmp_path, **options), rows, loss_type=loss_type, eval_dataset=eval_rows
    )
    expected, update = (update_of(t.model, t.train) for t in (theirs, ours))
    assert_same_update(update, expected, tolerance=1e-10)
    for name in ("loss", "grad_norm", "nll", "mean_gate", "eval_nll", "eval_mean_token_accuracy"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-6) != []


def test_a_quantised_base_trains_its_adapter_alike_with_and_without_evaluations(
    tmp_path: Path,
) -> None:
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(base)

    def run(**options: Any) -> Update:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(
            base,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            device_map={"": "cpu"},
            dtype=torch.float32,
        )
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        )
        args = arguments(tmp_path, max_steps=3, **options)
        trainer = make_trainer(args, make_rows(8), model, eval_dataset=make_rows(3, seed=1))
        return update_of(trainer.model, trainer.train)

    plain = run()
    assert_same_update(run(eval_strategy="steps", eval_steps=1), plain, tolerance=1e-6)


class Scaled(Trainer):
    """A trainer of one's own, with a constructor of its own."""

    def __init__(self, *args: Any, scale: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, **kwargs)
        return (self.scale * result[0], result[1]) if return_outputs else self.scale * result


def test_trainers_of_ones_own_have_the_gated_head_beside_theirs(tmp_path: Path) -> None:
    class GatedScaled(GatedTrainer, Scaled):
        pass

    class ScaledGated(GatedTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    rows = make_rows(8)
    model = qwen3()
    twice = 2 * formula_mean(model, rows, "deft")
    expected = gradient_update(model, twice, LEARNING_RATE)
    for trainer_class, options in ((GatedScaled, {"scale": 2.0}), (ScaledGated, {})):
        trainer = make_trainer(arguments(tmp_path), rows, trainer_class=trainer_class, **options)
        assert_same_update(update_of(trainer.model, trainer.train), expected, tolerance=1e-10)
        assert logged(trainer, "nll") != []


def test_every_training_of_a_model_init_begins_with_a_new_gated_model(tmp_path: Path) -> None:
    made: list[PreTrainedModel] = []

    def model_init() -> PreTrainedModel:
        made.append(qwen3())
        return made[-1]

    rows = make_rows(8)
    trainer = make_trainer(
        arguments(tmp_path, max_steps=2), rows, model_init=model_init, loss_type="cayley_trans"
    )
    runs = []
    for _ in range(2):
        trainer.train()
        assert trainer.model is made[-1]
        assert gated_head_of(trainer.model) is trainer.gating.head
        runs.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    assert len(made) == 3
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    fresh = make_trainer(arguments(tmp_path, max_steps=2), rows, loss_type="cayley_trans")
    fresh.train()
    assert all(torch.equal(runs[0][k], v) for k, v in fresh.model.state_dict().items())
    assert [len(logged(each, "nll")) for each in (trainer, fresh)] == [2, 2]


def test_model_of_an_earlier_trainer_trains_with_what_the_next_one_asks_for(
    tmp_path: Path,
) -> None:
    model, rows = qwen3().float(), make_rows(8)
    # bfloat16 wraps the model's forward.
    first = arguments(tmp_path, bf16=True, learning_rate=0.0)
    make_trainer(first, rows, model, loss_type="cayley").train()
    trl.make_trainer(trl.config(tmp_path, learning_rate=0.0), rows, model).train()
    again = make_trainer(arguments(tmp_path), rows, model, loss_type="p")
    update = update_of(model, again.train)
    fresh = make_trainer(arguments(tmp_path), rows, qwen3().float(), loss_type="p")
    expected = update_of(fresh.model, fresh.train)
    assert all(torch.equal(update[name], expected[name]) for name in expected)


def test_settings_and_parameters_come_as_a_dict_or_as_json(tmp_path: Path) -> None:
    for given in ({"a": 0.5, "tile_rows": 3}, '{"a": 0.5, "tile_rows": 3}'):
        trainer = make_trainer(
            arguments(tmp_path), make_rows(2), loss_type="alpha", loss_kwargs=given
        )
        assert trainer.gating.head.objective == deft_plugin.build_objective("alpha", {"a": 0.5})
        assert trainer.gating.head.settings.tile_rows == 3
    own = deft_plugin.build_objective("alpha", {"a": 0.75})
    trainer = make_trainer(arguments(tmp_path), make_rows(2), loss_type=own)
    assert trainer.gating.head.objective == own
    assert not isinstance(trainer, SFTTrainer)
