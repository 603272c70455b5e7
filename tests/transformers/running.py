"""transformers' trainer with a gated head, on rows of token ids: one step of SGD on a CPU unless a test says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, PreTrainedModel, TrainingArguments

from deft_plugin import GatedTrainer
from tests.tiny import tiny_tokenizer
from tests.updates import Rows, qwen3

LEARNING_RATE = 0.1


def arguments(output_dir: Path, **overrides: Any) -> TrainingArguments:
    """For one optimizer step over eight rows, in the model's own precision."""
    values = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
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
    return TrainingArguments(**values)


def make_trainer(
    args: TrainingArguments,
    rows: Rows | Any = None,
    model: PreTrainedModel | None = None,
    trainer_class: Any = GatedTrainer,
    **others: Any,
) -> Any:
    """A trainer on `rows`, of `qwen3()` unless a model is given. A list of rows is a data set as torch takes it."""
    others.setdefault("data_collator", DataCollatorForSeq2Seq(tiny_tokenizer()))
    if "model_init" not in others:
        others["model"] = qwen3() if model is None else model
    return trainer_class(args=args, train_dataset=rows, **others)
