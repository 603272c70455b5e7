"""A vocabulary spread over ranks: each projects onto its own rows of the lm_head, and scalars travel.

Tensor parallelism shards an lm_head's weight (V, H) by rows. Every rank has the same hidden states and the
same targets, and folds its own columns of a tile of logits. Two small reductions a tile make the
statistics whole, the same on every rank: first the largest logit and the target's, then the sums. Each rank then
holds its own columns of the error, forms its own rows of the weight's gradient, and adds up the hidden states'
with the others, once a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class VocabularyShard:
    """Which part of the vocabulary this rank has, dealt out as `torch.chunk` and DTensor do.

    Every rank has ceil(V / ranks) tokens, the last ones fewer or none.

    Args:
        group: the ranks that have all of it together.
        vocab_size: number of tokens of all ranks, V.
    """

    group: distributed.ProcessGroup
    vocab_size: int

    @property
    def largest_size(self) -> int:
        """Most tokens that a rank has."""
        return -(-self.vocab_size // distributed.get_world_size(self.group))

    @property
    def first(self) -> int:
        """The token of this rank's first row."""
        return min(self.largest_size * distributed.get_rank(self.group), self.vocab_size)

    @property
    def size(self) -> int:
        """Number of this rank's tokens."""
        return min(self.largest_size, self.vocab_size - self.first)

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place. Collective."""
        distributed.all_reduce(values, distributed.ReduceOp.SUM, self.group)
        return values

    def max_(self, values: Tensor) -> Tensor:
        """Maximum over the ranks, in place. Collective."""
        distributed.all_reduce(values, distributed.ReduceOp.MAX, self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """(n, k) of every rank side by side, (n, k * ranks). Collective."""
        parts = [torch.empty_like(values) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(parts, values.contiguous(), self.group)
        return torch.cat(parts, dim=1)
