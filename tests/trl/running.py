"""TRL's trainer on rows of token ids: one step of SGD on a CPU unless a test says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from deft_plugin.trl import SFTConfig, SFTTrainer
from tests.tiny import tiny_tokenizer
from tests.updates import Rows, qwen3

LEARNING_RATE = 0.1


def config(output_dir: Path, config_class: Any = SFTConfig, **overrides: Any) -> Any:
    """Arguments for one optimizer step over four rows with DEFT, in the model's own precision."""
    values = {
        "loss_type": "deft",
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
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
        "bf16": False,
        "gradient_checkpointing": False,
        **overrides,
    }
    return config_class(**values)


def make_trainer(
    args: Any,
    rows: Rows | Dataset | IterableDataset,
    model: PreTrainedModel | str | None = None,
    trainer_class: Any = SFTTrainer,
    **arguments: Any,
) -> Any:
    """A trainer on `rows`, of `qwen3()` unless a model is given."""
    arguments.setdefault("processing_class", tiny_tokenizer())
    return trainer_class(
        model=qwen3() if model is None else model,
        args=args,
        train_dataset=as_dataset(rows),
        **arguments,
    )


def as_dataset(rows: Any) -> Any:
    """Rows as the trainer takes them; a data set as it is."""
    return Dataset.from_list(rows) if isinstance(rows, list) else rows
