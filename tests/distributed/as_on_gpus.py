"""What accelerate and torch do on GPUs alone, done on a CPU: which ranks share a model, and attention to all parts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, distributed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def as_on_gpus() -> None:
    """Have accelerate take this process for one with a GPU, as to FSDP, and to context and tensor parallelism.

    It asks for the backend's name alone; gloo does what is asked of it. In a process of its own.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def attend_to_all_parts(group: Callable[[], Any]) -> None:
    """Have models whose attention is "sdpa" attend to the parts of a sequence on all ranks of a group.

    In place of ring attention, whose kernels are for GPUs: keys and values are gathered, and who sees whom is told by
    the positions that the model was given.

    Args:
        group: the ranks; None where they have whole sequences.
    """

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        position_ids: Tensor,
        **_: Any,
    ) -> tuple[Tensor, None]:
        ranks, all_positions = group(), position_ids
        if ranks is not None:
            key, value, all_positions = (
                Gather.apply(tensor, dimension, ranks)
                for tensor, dimension in ((key, 2), (value, 2), (position_ids, 1))
            )
        repetitions = module.num_key_value_groups
        key, value = (tensor.repeat_interleave(repetitions, 1) for tensor in (key, value))
        later = all_positions[:, None, None, :] > position_ids[:, None, :, None]
        weights = (query @ key.mT * scaling).masked_fill(later, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention


class Gather(torch.autograd.Function):
    """Every rank's tensor, one after the other. (On gloo, torch's own has a wrong gradient where it comes transposed.)"""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dimension: int, group: Any) -> Tensor:
        ctx.dimension, ctx.group = dimension, group
        parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(parts, tensor.contiguous(), group)
        return torch.cat(parts, dimension)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        whole = gradient.contiguous()
        distributed.all_reduce(whole, group=ctx.group)
        ranks, rank = distributed.get_world_size(ctx.group), distributed.get_rank(ctx.group)
        return whole.chunk(ranks, ctx.dimension)[rank], None, None
