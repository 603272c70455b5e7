"""Which rows of an lm_head's weight are on this rank, under tensor parallelism: DTensor's, and DeepSpeed's."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor, Shard

from ..ops.shard import VocabularyShard


def shard_of(weight: DTensor) -> VocabularyShard | None:
    """The rows of an lm_head's weight on this rank; None where every rank has all of them."""
    mesh, placements = weight.device_mesh, weight.placements
    if all(placement.is_replicate() for placement in placements):
        return None
    if mesh.ndim != 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
        raise ValueError(
            f"The lm_head's weight is distributed as {placements} over {mesh}. The gated head supports rows "
            "sharded over a mesh of one dimension, (Shard(dim=0),): shard lm_head by columns of its "
            'output ("colwise"), or leave it out of the plan.'
        )
    return VocabularyShard(mesh.get_group(), weight.size(0))


def deepspeed_shard_of(layer: Any) -> VocabularyShard | None:
    """The rows that DeepSpeed's tensor parallelism (AutoTP) has left on this rank; None where that is not in use.

    Its layers average nothing and add up their input's gradient, as the gated head does.
    """
    group, sizes = getattr(layer, "mp_group", None), getattr(layer, "_partition_sizes", None)
    if group is None:
        return None
    if sizes is None:
        raise ValueError(
            f"The lm_head is DeepSpeed's {type(layer).__name__}, which does not tell which of its rows are on which rank. Use "
            "DeepSpeed 0.19.8 or later with tensor_parallel, or leave tensor_parallel out."
        )
    shard = VocabularyShard(group, sum(sizes))
    # The same on all ranks, or one of them would wait for those that stop.
    dealt = [
        min(shard.largest_size, max(shard.vocab_size - rank * shard.largest_size, 0))
        for rank in range(len(sizes))
    ]
    if list(sizes) != dealt or layer.weight.size(0) != shard.size:
        raise ValueError(
            f"The lm_head, DeepSpeed's {type(layer).__name__}, has a weight of {tuple(layer.weight.shape)} on this rank, of "
            f"{sum(sizes):,} in parts of {tuple(sizes)}. The gated head supports rows dealt out evenly: a vocabulary "
            f"that {len(sizes)} divides, sharded by the lm_head's output."
        )
    return shard
