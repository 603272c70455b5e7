"""One run of the study: a base model, fine-tuned on a data set with an objective, and its held-out figures."""

from __future__ import annotations

import logging
import math
import pydoc_data.topics
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from adapter import in_float32, lora_config
from answer_tokens import answer_tokens
from datasets import Dataset
from real_model import NAME, get_real_model
from study_data import DATA_SEED, REAL, SMALL, Row, StudyData, row_of, training_rows
from study_measure import held_out_figures, text_nll
from study_results import BASE, Run
from tasks import PRETRAINING_TASKS, make_splits
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from deft_plugin.trl import SFTConfig, SFTTrainer

BASE_MODEL = Path(__file__).resolve().parent.parent / "assets" / "base_model"
ON_GPU = torch.cuda.is_available()
# TRL's own nll projects the prompts' positions too, which is most of the time where answers are short.
LOSSES = {"nll": {"loss_type": "alpha", "loss_kwargs": {"a": 0}}}
LORA_RANK = 16


@dataclass(frozen=True)
class Scale:
    """What the runs of one scale have in common.

    Attributes:
        model: a folder, a name on the hub, or "smollm2".
        lora: whether an adapter is trained, or the whole model.
        data: its data sets by name.
        objectives: in the order in which they run. "p" has the gradient of "dft", which is not run beside it.
        learning_rates: the grid that each objective's is chosen from.
        chooses_on_clean: whether it is chosen with clean answers alone, and kept for corrupted ones.
        train_rows: rows that a run trains on, once, where the data set does not say.
        batch_size: rows a step, or packed rows.
        packed_length: tokens of a packed row, which holds several rows; None for no packing.
        eval_batch_size: rows of a forward pass of an evaluation.
    """

    model: str
    lora: bool
    data: dict[str, StudyData]
    objectives: tuple[str, ...]
    learning_rates: tuple[float, ...]
    chooses_on_clean: bool
    train_rows: int
    batch_size: int = 16
    packed_length: int | None = None
    eval_batch_size: int = 32


SCALES = {
    "small": Scale(
        str(BASE_MODEL),
        False,
        SMALL,
        ("nll", "p", "eaft", "cayley", "cayley_trans", "deft"),
        (1e-4, 3e-4, 1e-3, 3e-3),
        chooses_on_clean=False,
        train_rows=640,
    ),
    "real": Scale(
        NAME,
        True,
        REAL,
        ("nll", "p", "cayley_trans", "deft"),
        (6e-4, 2e-3, 6e-3),
        chooses_on_clean=True,
        train_rows=256,
        batch_size=4,
        packed_length=256,
    ),
}


def perform(run: Run, scale: Scale) -> dict[str, float | str]:
    """Train and measure. Returns the figures by name, and what they were made with."""
    start = time.process_time()
    name = str(get_real_model()) if scale.model == NAME else scale.model
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=torch.bfloat16 if scale.lora else torch.float32,
        # Matrix products are faster than PyTorch's fused attention for a CPU at these lengths.
        attn_implementation=None if ON_GPU else "eager",
        device_map={"": "cuda" if ON_GPU else "cpu"},
    )
    data = scale.data[run.data]
    if run.objective != BASE:
        rows = training_rows(data, data.train_rows or scale.train_rows, run.corrupted, run.seed)
        model = train(model, tokenizer, rows, run, scale)
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16):
        figures = held_out_figures(
            model, tokenizer, data.load()[run.split], data.score, scale.eval_batch_size
        )
        is_test = run.split == "test"
        figures["other_nll"] = forgetting(model, tokenizer, run, scale) if is_test else math.nan
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "deft_plugin")}
    return {**figures, "seconds": time.process_time() - start, **versions}


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    run: Run,
    scale: Scale,
) -> PreTrainedModel:
    """The model after one epoch with TRL's trainer, at the paper's settings but for learning rate and batch."""
    set_seed(run.seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch,
                **LOSSES.get(run.objective, {"loss_type": run.objective}),
                num_train_epochs=1,
                per_device_train_batch_size=scale.batch_size,
                learning_rate=run.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                adam_beta2=0.95,
                weight_decay=0.01,
                max_grad_norm=1.0,
                max_length=scale.packed_length,
                packing=scale.packed_length is not None,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=True,
                use_cpu=not ON_GPU,
                dataloader_pin_memory=ON_GPU,
                gradient_checkpointing=False,
                seed=run.seed,
            ),
            train_dataset=Dataset.from_list([row.messages for row in rows]),
            processing_class=tokenizer,
            peft_config=lora_config(LORA_RANK) if scale.lora else None,
        )
        trainer.remove_callback(PrinterCallback)
        in_float32(trainer.model)
        trainer.train()
    trained: PreTrainedModel = trainer.accelerator.unwrap_model(
        trainer.model, keep_fp32_wrapper=False
    )
    return trained


def forgetting(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Run, scale: Scale
) -> float:
    """nll of what was not trained on: plain text, or, for the small model, the other tasks that it was made with."""
    if scale.model != str(BASE_MODEL):
        text = "\n\n".join(pydoc_data.topics.topics.values())
        return text_nll(model, tokenizer, text, tokens=2048, window=512)
    rows = [
        row.messages for task, rows in _other_tasks().items() if task != run.data for row in rows
    ]
    tokens = answer_tokens(model, tokenizer, rows, scale.eval_batch_size)
    return -tokens.log_p.mean().item()


@cache
def _other_tasks() -> dict[str, list[Row]]:
    return {
        name: [row_of(row) for row in make_splits(task, 1, 24, DATA_SEED)["held_out"]]
        for name, task in PRETRAINING_TASKS.items()
    }


def quieten() -> None:
    """Keep libraries' notes out of a table that grows a line at a time."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("deft_plugin").setLevel(logging.ERROR)
