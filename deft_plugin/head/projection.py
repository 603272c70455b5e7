"""What an lm_head makes of hidden states, as one product for the core.

    logits = hidden_states @ weight.T + low_rank_hidden @ low_rank_weight.T + bias

Adapters are the second pair, so that the weight is neither copied nor asked for a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional

from ..ops.shard import VocabularyShard


@dataclass(frozen=True)
class Projection:
    """What an lm_head makes of hidden states, as tensors.

    Args:
        hidden_states: (..., H), the layer's input after what it does to it first.
        weight: (V, H), or this rank's rows of it.
        bias: (V,) or None.
        low_rank: (..., r) and (V, r), whose product is added; None without an adapter.
        shard: which rows the weight has; None for all of them.
    """

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    shard: VocabularyShard | None = None

    def logits(self) -> Tensor:
        """The layer's logits (..., V), for comparison with its own."""
        weight = self.weight.to(self.hidden_states.dtype)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        logits = functional.linear(self.hidden_states, weight, bias)
        if self.low_rank is not None:
            hidden, weight = self.low_rank
            logits = logits + functional.linear(hidden, weight.to(hidden.dtype)).to(logits.dtype)
        return logits

    def first_rows(self, vocab_size: int) -> Projection:
        """The projection onto the first `vocab_size` tokens, where a model cuts padding off its logits."""
        if self.shard is not None or vocab_size == self.weight.size(0):
            return self
        low_rank = self.low_rank
        return replace(
            self,
            weight=self.weight[:vocab_size],
            bias=None if self.bias is None else self.bias[:vocab_size],
            low_rank=None if low_rank is None else (low_rank[0], low_rank[1][:vocab_size]),
        )
