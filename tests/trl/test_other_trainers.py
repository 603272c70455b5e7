"""Other trainers on the same model, before and after; and trainers that inherit from SFTTrainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel

import deft_plugin
from deft_plugin.trl import SFTTrainer
from deft_plugin.trl.config import HAS_FUSED_HEAD
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trl.running import as_dataset, config, make_trainer
from tests.trl.test_models import LORA, assert_step_is_that_of_the_formula
from tests.updates import logged, make_rows


def train_with_nll(model: PreTrainedModel, output: Path) -> None:
    """TRL's own loss on a fused head, which it puts over the model's forward."""
    args = config(output, trl.SFTConfig, loss_type="nll" if HAS_FUSED_HEAD else "chunked_nll")
    make_trainer(args, make_rows(4), model, trainer_class=trl.SFTTrainer).train()


def train_with_dpo(model: PreTrainedModel, output: Path) -> None:
    args = trl.DPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=2,
        max_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    pairs = Dataset.from_list(
        [
            {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 11"},
            {"prompt": "So", "chosen": " no", "rejected": "?"},
        ]
    )
    reference = None if hasattr(model, "peft_config") else tiny_model("qwen3")
    trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=pairs,
        processing_class=tiny_tokenizer(),
    ).train()


@pytest.mark.parametrize(
    "others", [[train_with_nll], [train_with_dpo], [train_with_nll, train_with_nll]]
)
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_deft_again_after_another_trainer(tmp_path: Path, others: Any, adapter: Any) -> None:
    peft_config = None if adapter is None else LoraConfig(**adapter)
    first = make_trainer(config(tmp_path), make_rows(4), peft_config=peft_config)
    first.train()
    for train in others:
        train(first.model, tmp_path)
    again = make_trainer(config(tmp_path), make_rows(4, seed=1), first.model)
    assert "forward" not in vars(deft_plugin.gated_head_of(again.model).model)
    assert_step_is_that_of_the_formula(again)


class Harmless(SFTTrainer):
    """Looks at the loss, as trainers that log something do."""

    seen: float = 0.0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.seen = loss.item()
        return loss


class Penalised(SFTTrainer):
    """Takes the logits for something beside the loss."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        logits = model(input_ids=inputs["input_ids"]).logits
        return super().compute_loss(model, inputs, *args, **kwargs) + 0 * logits.sum()


class Helped(SFTTrainer):
    """Leaves it to a method of its own."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return self._looked_at(*args, **kwargs)

    def _looked_at(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("trainer_class", [Harmless, Penalised, Helped])
def test_trainers_that_use_the_loss_are_welcome(tmp_path: Path, trainer_class: Any) -> None:
    trainer = make_trainer(config(tmp_path), make_rows(4), trainer_class=trainer_class)
    assert_step_is_that_of_the_formula(trainer)
    if trainer_class is Harmless:
        assert trainer.seen == pytest.approx(logged(trainer, "loss")[0])


class Distillation(SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(input_ids=inputs["input_ids"]).logits.square().mean()


def test_trainer_with_a_loss_of_its_own_is_refused_before_the_data_is_touched(
    tmp_path: Path,
) -> None:
    message = r"Distillation has a loss of its own.*loss_type='deft'.*test_other_trainers"
    with pytest.raises(ValueError, match=message):
        make_trainer(config(tmp_path), object(), trainer_class=Distillation)
    make_trainer(
        config(tmp_path, loss_type="nll"), make_rows(2), trainer_class=Distillation
    ).train()


@pytest.mark.usefixtures("trl_as_it_was")
@pytest.mark.parametrize("name", ["GKD", "GOLD"])
def test_trls_distillation_trainers_are_refused(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip(f"trl.experimental.{name.lower()}")
    trainer_class, config_class = (
        getattr(package, f"{name}{kind}") for kind in ("Trainer", "Config")
    )
    deft_plugin.register()
    # Off policy, as in most examples, with a teacher.
    args = config(tmp_path, config_class, lmbda=0.0)
    rows = [
        {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    ] * 4
    with pytest.raises(ValueError, match=f"{name}Trainer has a loss of its own"):
        trainer_class(
            model=tiny_model("qwen3"),
            teacher_model=tiny_model("qwen3"),
            args=args,
            train_dataset=as_dataset(rows),
            processing_class=tiny_tokenizer(),
        )
