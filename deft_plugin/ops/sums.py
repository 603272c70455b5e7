"""What a fold leaves of a row of logits: six numbers, from which all statistics of a call follow at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import Objective, TokenStatistics


class Sums(NamedTuple):
    """The rows of a (6, n) tensor in float32 or float64, a column a token.

    z_y is the target's logit, m >= z_v the row's largest and e_v = exp(z_v - m).

    Args:
        offset: z_y - m.
        is_top1: 1 where the target has the largest logit, else 0.
        others: sum of e_v over the others than the target, so that 1 - p_y does not cancel.
        squares: sum of e_v^2 over the others; anything unless collision was requested.
        weighted: sum of e_v (z_v - m) over the others; anything unless entropy was requested.
        row_factor: what the token's row of the error is still to be multiplied by.
    """

    offset: Tensor
    is_top1: Tensor
    others: Tensor
    squares: Tensor
    weighted: Tensor
    row_factor: Tensor


@dataclass(frozen=True)
class StatisticsRequest:
    """Which statistics to compute beside log p_y and the argmax hit."""

    collision: bool = False
    entropy: bool = False
    top_k: int | None = None

    @classmethod
    def of(cls, objective: Objective, with_entropy: bool = False) -> StatisticsRequest:
        """What `objective` needs, and the entropy where the caller wants it for its log."""
        return cls(
            collision="collision" in objective.needs,
            entropy=with_entropy or "entropy" in objective.needs,
            top_k=objective.top_k,
        )


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_sums(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(6, count), to be filled by a fold of logits of `dtype`."""
    return torch.empty(len(Sums._fields), count, dtype=statistics_dtype(dtype), device=device)


def statistics_of_sums(
    sums: Tensor, vocab_size: int, request: StatisticsRequest, top_k_entropy: Tensor | None = None
) -> TokenStatistics:
    """Statistics of n tokens; NaN for a row with NaN or +inf, or with nothing but -inf.

    Args:
        sums: (6, n), see `Sums`.
        vocab_size: number of logits of a token.
        request: what else the sums hold.
        top_k_entropy: (n,), which does not follow from sums.
    """
    offset, is_top1, others, squares, weighted, _ = Sums(*sums)
    power = offset.exp()
    total = others + power
    # Of a sum that is 1 but for little, where the target is the largest or another's probability is nearly 1.
    log_total = (others + offset.expm1()).log1p()
    missed = others / total
    entropy = None
    if request.entropy:
        # Two terms >= 0, so that nothing cancels; rounding may leave -1e-8 where p = 1.
        target_term = torch.where(power == 0, 0, offset * power)
        entropy = (log_total - (weighted + target_term) / total).clamp(min=0)
    return TokenStatistics(
        log_p=torch.where(missed < 0.5, torch.log1p(-missed), offset - log_total),
        vocab_size=vocab_size,
        # Without the maximum's NaN, which a reduction may have lost.
        is_top1=(is_top1 == 1) & ~total.isnan(),
        collision=(squares + power.square()) / total.square() if request.collision else None,
        entropy=entropy,
        top_k_entropy=top_k_entropy,
    )
