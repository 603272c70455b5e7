"""Runs of TRL's trainer on several processes, to be compared with the same run on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig

from deft_plugin.metrics import METRICS

from ..tiny import tiny_model, tiny_tokenizer
from ..updates import Rows, make_rows
from .steps import Parameters, Run, whole_parameters

STEPS, EVAL_STEPS = 5, 2
COMPARED = {"loss", "grad_norm", *METRICS, *(f"eval_{name}" for name in METRICS)}
# Two heads of keys and values, so that two ranks can share them; no sliding window, which parts would not know of.
ARCHITECTURES = {
    "full": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "lora": ("llama", {}),
    "mixture": ("mixtral", {"head_dim": 16, "output_router_logits": False}),
}


def make_step_rows() -> Rows:
    """Four rows a step. In the second step one rank scores no token; in the third, neither does in one micro-batch."""
    rows = make_rows(4 * STEPS)
    for index in (5, 7, 8, 9):
        # TRL drops rows without labels. The first one's is shifted away.
        first, *others = rows[index]["input_ids"]
        rows[index]["labels"] = [first] + [-100] * len(others)
    return rows


def save_models(directory: Path) -> None:
    """What `Run.model` stands for."""
    for kind, (architecture, options) in ARCHITECTURES.items():
        model = tiny_model(
            architecture, **{"initializer_range": 0.08, "num_key_value_heads": 2, **options}
        )
        model.save_pretrained(directory / kind)
        tiny_tokenizer().save_pretrained(directory / kind)


def make_trained(run: Run, directory: Path, rows: Rows | None = None, **options: Any) -> Any:
    """A trainer after it has trained a model in `directory`, with evaluations on the way."""
    from ..trl.running import as_dataset, config, make_trainer

    # What an earlier run in this process has left behind.
    AcceleratorState._reset_state(reset_partial_state=True)
    args = config(
        directory,
        loss_type=run.objective,
        loss_kwargs=run.parameters,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        eval_steps=EVAL_STEPS,
        **{
            # A mean over micro-batches, which a step's tokens are dealt to in another way on several ranks.
            "router_aux_loss_coef": 0.0,
            # TRL 1.9 leaves device_map out on GPUs alone.
            "model_init_kwargs": {"dtype": "float32", "device_map": None},
            "eval_strategy": "steps",
            **options,
        },
    )
    torch.manual_seed(0)
    trainer = make_trainer(
        args,
        make_step_rows() if rows is None else rows,
        str(directory / run.model),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if run.model == "lora" else None,
        eval_dataset=as_dataset(make_rows(5, seed=1)),
    )
    trainer.train()
    return trainer


def parameters_of(trainer: Any) -> Parameters:
    """The whole parameters that train."""
    if trainer.args.deepspeed:
        # After an evaluation ZeRO-3 may have begun to fetch some for the next step.
        trainer.model_wrapped.empty_partition_cache()
    return whole_parameters(trainer.model)


def assert_same_log(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Every step's and evaluation's figures."""
    assert [entry.keys() for entry in actual] == [entry.keys() for entry in expected]
    compared = 0
    for entry, reference in zip(actual, expected, strict=True):
        for name in COMPARED & entry.keys():
            assert entry[name] == pytest.approx(reference[name], rel=1e-4), name
            compared += 1
    # More than those of the steps.
    assert compared > STEPS * (len(METRICS) + 2)
