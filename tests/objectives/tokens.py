"""Token statistics made by hand, without any logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deft_plugin import TokenStatistics


def token_statistics(
    log_p: Sequence[float],
    *,
    collision: Sequence[float] | None = None,
    entropy: Sequence[float] | None = None,
    top_k_entropy: Sequence[float] | None = None,
    vocab_size: int = 1000,
    dtype: torch.dtype = torch.float64,
) -> TokenStatistics:
    """Statistics of `len(log_p)` tokens; what is left out counts as not computed."""

    def tensor(values: Sequence[float] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=dtype)

    return TokenStatistics(
        log_p=torch.tensor(log_p, dtype=dtype),
        vocab_size=vocab_size,
        collision=tensor(collision),
        entropy=tensor(entropy),
        top_k_entropy=tensor(top_k_entropy),
    )
