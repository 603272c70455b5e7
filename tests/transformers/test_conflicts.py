"""What would train something else is refused before data or weights are touched, with what to do instead."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)

from deft_plugin import GatedTrainer
from tests.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.transformers.running import arguments, make_trainer
from tests.updates import formula_mean, logged, make_rows, qwen3, update_of


class Untouchable:
    """A data set that fails a test as soon as it is looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the data set's {name} was asked for")


def refuse(args: Any, message: str, **others: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(args, Untouchable(), **others)


def test_unknown_names_and_parameters(tmp_path: Path) -> None:
    refuse(arguments(tmp_path), r"'deftt'.*deft", loss_type="deftt")
    message = r"'deft' has no parameter 'a'\..*For every objective loss_kwargs also takes: path"
    refuse(arguments(tmp_path), message, loss_kwargs={"a": 0.5})
    refuse(arguments(tmp_path), r"loss_kwargs='a: 1' is not JSON", loss_kwargs="a: 1")
    refuse(arguments(tmp_path), r"path='fast' is not valid", loss_kwargs={"path": "fast"})


def test_other_losses(tmp_path: Path) -> None:
    smoothed = arguments(tmp_path, label_smoothing_factor=0.1)
    refuse(smoothed, r"label_smoothing_factor=0.1.*loss_type='deft'.*Set it to 0")
    message = r"compute_loss_func would replace loss_type='p'.*deft_plugin\.objective"
    refuse(arguments(tmp_path), message, compute_loss_func=len, loss_type="p")


@pytest.mark.parametrize(
    "name",
    ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"],
)
@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_batches_of_nothing(tmp_path: Path, name: str, size: Any) -> None:
    args = arguments(tmp_path)
    setattr(args, name, size)
    refuse(args, f"{name}={size} must be a whole number of at least 1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: setattr(t.args, "label_smoothing_factor", 0.1), "label_smoothing_factor=0.1"),
        (lambda t: setattr(t, "label_smoother", len), "label_smoother would replace"),
        (lambda t: setattr(t, "compute_loss_func", len), "compute_loss_func would replace"),
    ],
)
def test_another_loss_set_after_the_start_stops_training(
    tmp_path: Path, change: Any, message: str
) -> None:
    trainer = make_trainer(arguments(tmp_path), make_rows(2))
    change(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train()


class Distillation(GatedTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(input_ids=inputs["input_ids"]).logits.square().mean()


class Constant(GatedTrainer):
    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return sum(parameter.square().mean() for parameter in model.parameters())


def test_trainers_with_a_loss_of_their_own(tmp_path: Path) -> None:
    message = (
        r"Distillation has a loss of its own.*GatedTrainer's compute_loss.*transformers.Trainer"
    )
    refuse(arguments(tmp_path), message, trainer_class=Distillation)
    # One that does not show in its code stops at the first step.
    trainer = make_trainer(arguments(tmp_path), make_rows(2), trainer_class=Constant)

    def train() -> None:
        with pytest.raises(RuntimeError, match="not computed by the gated head"):
            trainer.train()

    assert all(change.abs().max() == 0 for change in update_of(trainer.model, train).values())


def test_models_whose_labels_are_not_the_next_token(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    config = AutoConfig.for_model("t5", vocab_size=VOCAB_SIZE, **sizes)
    encoder_decoder = AutoModelForSeq2SeqLM.from_config(config)
    refuse(arguments(tmp_path), "not a decoder-only causal LM.*gated_loss", model=encoder_decoder)
    refuse(arguments(tmp_path), "no lm_head", model=tiny_model("qwen2").model)
    name: Any = "Qwen/Qwen3-8B"
    refuse(arguments(tmp_path), r"model='Qwen/Qwen3-8B'.*from_pretrained", model=name)


@pytest.mark.parametrize("size", ["cp_size", "sp_size"])
def test_coupled_tokens_of_parts_of_sequences(tmp_path: Path, size: str) -> None:
    args = arguments(tmp_path)
    args.parallelism_config = ParallelismConfig(**{size: 2})
    coupled = {"loss_type": "cayley_trans", "loss_kwargs": {"scope": "micro_batch"}}
    refuse(args, rf"parallelism_config\.{size}=2 .*'ema' or 'global'", **coupled)


def test_each_ranks_own_count_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path, average_tokens_across_devices=False)
    make_trainer(args, make_rows(8))
    monkeypatch.setattr(type(args), "world_size", 2)
    refuse(args, "average_tokens_across_devices=False divides by each rank")


def test_collators_that_make_other_labels_or_none(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<unk>"})
    masked = DataCollatorForLanguageModeling(tokenizer)
    refuse(arguments(tmp_path), "mlm=True.*mlm=False", data_collator=masked)
    tokens = Dataset.from_list([{"input_ids": row["input_ids"]} for row in make_rows(2)])
    message = r"train_dataset has no labels, but the columns input_ids,.*mlm=False"
    padding = (DataCollatorWithPadding(tiny_tokenizer()), DataCollatorForSeq2Seq(tiny_tokenizer()))
    for collator in (None, *padding):
        with pytest.raises(ValueError, match=message):
            make_trainer(arguments(tmp_path), tokens, data_collator=collator)
    texts = Dataset.from_list([{"prompt": "Is it?", "completion": " Yes"}])
    message = "train_dataset has neither input_ids nor labels, but the columns prompt, completion"
    for collator in (None, *padding, DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)):
        with pytest.raises(ValueError, match=message):
            make_trainer(arguments(tmp_path), texts, data_collator=collator)
    # A subclass may make tokens where it makes its loader.
    own = type("Own", (GatedTrainer,), {"get_train_dataloader": lambda self: None})
    make_trainer(arguments(tmp_path), texts, trainer_class=own)
    # As the message says.
    labels = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    trainer = make_trainer(arguments(tmp_path), tokens, data_collator=labels)
    trainer.train()
    rows = [{**row, "labels": row["input_ids"]} for row in make_rows(2)]
    expected = formula_mean(qwen3(), rows, "deft").item()
    assert logged(trainer, "loss") == [pytest.approx(expected, rel=1e-6)]


def test_several_gpus_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    monkeypatch.setattr(args, "_n_gpu", 2)
    with pytest.raises(ValueError, match=r"2 GPUs would use torch\.nn\.DataParallel"):
        make_trainer(args, make_rows(2))


def test_models_and_data_that_cannot_teach(tmp_path: Path) -> None:
    def refused(message: str, rows: Any, **others: Any) -> None:
        with pytest.raises(ValueError, match=message):
            make_trainer(arguments(tmp_path), rows, **others)

    rows = make_rows(4)
    refused("train_dataset has no rows", [])
    refused(r"eval_dataset\['b'\] has no rows", rows, eval_dataset={"a": rows, "b": []})
    wrong = make_rows(4)
    wrong[2]["input_ids"][-1] = VOCAB_SIZE
    message = r"1 of 4 rows have input_ids outside .*first in row 2: 128"
    refused(f"train_dataset: {message}", Dataset.from_list(wrong))
    evaluated = {"a": Dataset.from_list(wrong)}
    refused(rf"eval_dataset\['a'\]: {message}", rows, eval_dataset=evaluated)
    damaged = tiny_model("qwen3")
    damaged.model.layers[1].mlp.up_proj.weight.data[3, 5:7] = torch.nan
    refused(r"model\.layers\.1\.mlp\.up_proj\.weight has 2 NaN of", rows, model=damaged)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{index}>" for index in range(60)])
    tokenizer.pad_token = "<new59>"
    refused("pads with token", rows, processing_class=tokenizer)
    # A list of rows is looked at in its first batch.
    with pytest.raises(ValueError, match=r"train_dataset: the first batch has 1 input_ids outside"):
        make_trainer(arguments(tmp_path), wrong).train()


def test_smaller_is_better_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        save_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_nll",
    )
    assert args.greater_is_better is True
    with caplog.at_level(logging.WARNING, "deft_plugin"):
        make_trainer(args, make_rows(2), eval_dataset=make_rows(2))
    assert args.greater_is_better is False
    assert "greater_is_better set to False" in caplog.text


def test_arguments_may_be_left_out_as_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = GatedTrainer(qwen3())
    assert trainer.args.output_dir == "tmp_trainer"
    assert trainer.gating.head.objective.name == "deft"
