"""Experts on several ranks, as Axolotl's ExpertParallelPlugin shares them out, train as they do on one.

DeepEP, which carries the tokens to the experts, is for GPUs alone, and so is the plugin's cutting of the
weights: here tokens are gathered, and weights cut by hand. The factor on the experts' gradients is the plugin's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from axolotl.integrations.expert_parallel.plugin import ExpertParallelPlugin
from axolotl.utils import distributed as axolotl_distributed
from torch import Tensor, distributed, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tests.distributed.as_on_gpus import Gather
from tests.distributed.ranks import run_ranks
from tests.tiny import tiny_model, tiny_tokenizer
from tests.updates import make_rows

from .running import PLUGIN, configuration, make_trainer

EXPERTS = "axolotl.integrations.expert_parallel.ExpertParallelPlugin"
WEIGHTS = ("gate_up_proj", "down_proj")
STEPS = 3


def share_out_experts(model: Any) -> None:
    """Leave on each rank its part of the experts, to which all ranks' tokens come."""
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    ignored = []
    for name, module in model.named_modules():
        if all(isinstance(getattr(module, weight, None), nn.Parameter) for weight in WEIGHTS):
            for weight in WEIGHTS:
                part = getattr(module, weight).detach().chunk(ranks)[rank].clone()
                setattr(module, weight, nn.Parameter(part))
                ignored.append(f"{name}.{weight}")
    assert ignored
    model._ddp_params_and_buffers_to_ignore = ignored
    assert ExpertParallelPlugin._register_expert_grad_scale(model, ranks) == len(ignored)
    ALL_EXPERTS_FUNCTIONS.register("gathered", experts_on_all_ranks)
    model.set_experts_implementation("gathered")


def experts_on_all_ranks(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """This rank's experts of all ranks' tokens (ranks * n, H), summed over the experts of all ranks: (n, H)."""
    group = distributed.group.WORLD
    tokens, index, weights = (
        Gather.apply(part, 0, group) for part in (hidden_states, top_k_index, top_k_weights)
    )
    own = module.gate_up_proj.size(0)
    output = torch.zeros_like(tokens)
    for expert in range(own):
        row, slot = (index == expert + own * distributed.get_rank()).nonzero(as_tuple=True)
        gate, up = (tokens[row] @ module.gate_up_proj[expert].T).chunk(2, -1)
        result = (module.act_fn(gate) * up) @ module.down_proj[expert].T
        output = output.index_add(0, row, result * weights[row, slot, None])
    return _SumOfParts.apply(output)


class _SumOfParts(torch.autograd.Function):
    """The sum over ranks of (ranks * n, H), of which each keeps its n rows."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        whole = parts.clone()
        distributed.all_reduce(whole)
        return whole.chunk(distributed.get_world_size())[distributed.get_rank()]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Gather.apply(gradient.contiguous(), 0, distributed.group.WORLD)


@pytest.mark.parametrize("objective", ["deft", "cayley_trans"])
def test_experts_on_two_ranks_train_as_on_one(tmp_path: Path, objective: str) -> None:
    base_model = tmp_path / "base_model"
    # An auxiliary loss is a mean over micro-batches, which are others on two ranks.
    model = tiny_model("qwen3_moe", output_router_logits=False, initializer_range=0.08)
    model.save_pretrained(base_model)
    tiny_tokenizer().save_pretrained(base_model)
    rows = make_rows(4)
    common = {
        "deft_objective": objective,
        "max_steps": STEPS,
        "num_epochs": STEPS,
        "learning_rate": 0.1,
        "pad_to_sequence_len": True,
    }

    def trained(values: dict[str, Any], shared_out: bool) -> tuple[list[float], dict[str, Tensor]]:
        trainer = make_trainer(configuration(base_model, tmp_path, **common, **values), rows)
        if shared_out:
            share_out_experts(trainer.model)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        parameters = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        return losses, parameters

    def on(rank: int) -> tuple[list[float], dict[str, Tensor]]:
        # That of the process this one was forked from.
        axolotl_distributed.distributed_state = None
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
        shared = {"expert_parallel_size": 2, "plugins": [PLUGIN, EXPERTS]}
        return trained({"micro_batch_size": 2, **shared}, shared_out=True)

    expected_losses, expected = trained({"micro_batch_size": 4}, shared_out=False)
    for rank, (losses, parameters) in enumerate(run_ranks(on, tmp_path)):
        assert losses == pytest.approx(expected_losses, rel=1e-4)
        for name, value in expected.items():
            whole = value.chunk(2)[rank] if name.endswith(WEIGHTS) else value
            difference = (parameters[name] - whole).abs().max().item()
            assert difference < 1e-5, f"{name} differs by {difference}"
