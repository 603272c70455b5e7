"""transformers.Trainer: with a gated head, and with LogitsLoss as its compute_loss_func."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from deft_plugin import GatedHead, LogitsLoss, add_gated_head

from ..tiny import tiny_model, tiny_tokenizer
from ..updates import (
    Update,
    assert_same_update,
    formula_mean,
    gradient_update,
    make_rows,
    update_of,
)

LEARNING_RATE = 0.1
ROWS = make_rows(8)

# Labels of each row are counted in the whole step, not in the micro-batch they fall into.
splits = pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])


def make_model() -> PreTrainedModel:
    return tiny_model("llama", initializer_range=0.08).double()


def make_trainer(model: PreTrainedModel, directory: Path, **overrides: Any) -> Trainer:
    loss = overrides.pop("compute_loss_func", None)
    values: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **overrides,
    }
    dataset = Dataset.from_list(ROWS)
    return Trainer(
        model,
        TrainingArguments(str(directory), **values),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        compute_loss_func=loss,
    )


@pytest.fixture(scope="module")
def expected() -> Update:
    model = make_model()
    return gradient_update(model, formula_mean(model, ROWS, "deft"), LEARNING_RATE)


@splits
def test_a_step_with_the_head_does_not_depend_on_its_split(
    batch_size: int, accumulation: int, expected: Update, tmp_path: Path
) -> None:
    model = make_model()
    add_gated_head(model, "deft")
    trainer = make_trainer(
        model,
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    assert_same_update(update_of(model, trainer.train), expected, 1e-9)


@splits
def test_a_step_with_logits_loss_does_not_depend_on_its_split(
    batch_size: int, accumulation: int, expected: Update, tmp_path: Path
) -> None:
    model = make_model()
    trainer = make_trainer(
        model,
        tmp_path,
        compute_loss_func=LogitsLoss("deft"),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    assert_same_update(update_of(model, trainer.train), expected, 1e-9)


def test_logits_loss_takes_parameters_and_refuses_unknown_ones(tmp_path: Path) -> None:
    model = make_model()
    mean = formula_mean(model, ROWS, "alpha", a=0.25)
    expected = gradient_update(model, mean, LEARNING_RATE)
    loss = LogitsLoss("alpha", a=0.25)

    trainer = make_trainer(model, tmp_path, compute_loss_func=loss)

    assert_same_update(update_of(model, trainer.train), expected, 1e-9)
    with pytest.raises(ValueError, match="no parameter 'b'"):
        LogitsLoss("alpha", b=0.25)


def test_logits_loss_refuses_to_drop_an_auxiliary_loss(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    trainer = make_trainer(model, tmp_path, compute_loss_func=LogitsLoss("deft"))
    with pytest.raises(ValueError, match=r"auxiliary loss would be dropped.*add_gated_head"):
        trainer.train()


class WithoutLossArguments(LlamaForCausalLM):
    """Says that it would not take num_items_in_batch, as many models do."""

    accepts_loss_kwargs = False


def test_num_items_in_batch_arrives_whatever_the_models_own_forward_takes(
    expected: Update, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    model.__class__ = WithoutLossArguments
    head = add_gated_head(model)
    arrived = []
    gated_forward = GatedHead._gated_forward

    def spy(self: GatedHead, *args: Any, **kwargs: Any) -> Any:
        arrived.append(int(kwargs["num_items_in_batch"]))
        return gated_forward(self, *args, **kwargs)

    monkeypatch.setattr(GatedHead, "_gated_forward", spy)
    trainer = make_trainer(
        model, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )

    assert_same_update(update_of(model, trainer.train), expected, 1e-9)

    assert arrived == [sum(label != -100 for row in ROWS for label in row["labels"])] * 4
    head.remove()
    assert model.accepts_loss_kwargs is False


@pytest.mark.parametrize("gated_head", [True, False], ids=["head", "LogitsLoss"])
def test_evaluation_gives_the_objectives_mean(gated_head: bool, tmp_path: Path) -> None:
    model = make_model()
    mean = formula_mean(model, ROWS, "deft").item()
    if gated_head:
        add_gated_head(model)
    trainer = make_trainer(
        model, tmp_path, compute_loss_func=None if gated_head else LogitsLoss("deft")
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean, rel=1e-6)


def test_training_in_bfloat16_with_checkpoints_resumes_where_it_was(tmp_path: Path) -> None:
    def run(directory: Path, resume: bool) -> dict[str, torch.Tensor]:
        model = tiny_model("llama", initializer_range=0.08)
        add_gated_head(model)
        trainer = make_trainer(
            model,
            directory,
            max_steps=4,
            per_device_train_batch_size=2,
            bf16=True,
            gradient_checkpointing=True,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(resume_from_checkpoint=str(directory / "checkpoint-2") if resume else None)
        return model.state_dict()

    whole = run(tmp_path, resume=False)
    resumed = run(tmp_path, resume=True)

    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)
