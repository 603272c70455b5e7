"""Sequences that Axolotl cuts over two ranks move every parameter as far as one process does.

Axolotl's own hooks cut them; in place of ring attention, for GPUs alone, keys and values are gathered.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from axolotl.train import execute_training
from axolotl.utils import distributed as axolotl_distributed
from torch import Tensor

from tests.distributed.ranks import run_ranks
from tests.updates import make_rows

from . import gathered_attention
from .running import configuration, make_trainer

STEPS = 2
Parameters = dict[str, Tensor]


def trained(values: dict[str, Any], **unchecked: Any) -> tuple[list[float], Parameters]:
    """The steps' losses and the parameters after them."""
    trainer = make_trainer(values, make_rows(4), **unchecked)
    execute_training(trainer.axolotl_cfg, trainer, None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("objective", ["deft", "cayley_trans"])
def test_two_ranks_have_the_parameters_of_one(
    base_model: Path, tmp_path: Path, objective: str
) -> None:
    values = configuration(
        base_model,
        tmp_path,
        deft_objective=objective,
        max_steps=STEPS,
        num_epochs=STEPS,
        learning_rate=0.1,
    )

    def on(rank: int) -> tuple[list[float], Parameters]:
        # That of the process this one was forked from.
        axolotl_distributed.distributed_state = None
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
        build = ParallelismConfig.build_device_mesh
        ParallelismConfig.build_device_mesh = lambda self, _: build(self, "cpu")
        gathered_attention.register()
        split = {**values, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
        cut = {"context_parallel_size": 2, "attn_implementation": gathered_attention.NAME}
        return trained(split, **cut)

    expected_losses, expected = trained(values)
    for losses, parameters in run_ranks(on, tmp_path):
        assert losses == pytest.approx(expected_losses, rel=1e-4)
        for name, value in expected.items():
            difference = (parameters[name] - value).abs().max().item()
            assert difference < 1e-5, f"{name} differs by {difference}"
