"""From one tile of logits to token statistics and the error p - e_y, in place.

The error's target entry is minus the sum of the other probabilities rather than p_y - 1, and log p_y of
a confident token is log1p of that sum: neither cancels when p_y -> 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..objectives import Objective, TokenStatistics


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


def fold_logits_(
    logits: Tensor, targets: Tensor, request: StatisticsRequest
) -> tuple[Tensor, TokenStatistics]:
    """Overwrite `logits` with the error p - e_y and return it with the token statistics.

    Args:
        logits: (n, V), float32 or float64, contiguous; destroyed. -inf entries have p = 0. A row
            with NaN or +inf, or with nothing but -inf, has NaN statistics.
        targets: (n,), int64, in [0, V).
        request: optional statistics to compute.
    """
    targets = targets.unsqueeze(1)
    target_logit = logits.gather(1, targets).squeeze(1)
    largest_logit = logits.amax(1)
    top_k = top_k_entropy(logits, request.top_k) if request.top_k else None

    probabilities = torch.softmax(logits, dim=1, out=logits)
    # A CPU's softmax adds its row up in one go, so that a peaked row of 32,768 sums to 1 + 5e-6.
    probabilities.div_(probabilities.sum(1, keepdim=True))
    largest_probability = probabilities.amax(1)
    collision = sum_of_squares(probabilities) if request.collision else None
    entropy = torch.special.entr(probabilities).sum(1) if request.entropy else None

    error = probabilities.scatter_(1, targets, 0.0)
    others = error.sum(1)
    error.scatter_(1, targets, -others.unsqueeze(1))

    # The largest probability is 1/S, which gives log S without a second pass.
    log_p_of_rare = target_logit - largest_logit + largest_probability.log()
    return error, TokenStatistics(
        log_p=log_probability(others, log_p_of_rare),
        vocab_size=logits.size(1),
        is_top1=target_logit >= largest_logit,
        collision=collision,
        entropy=entropy,
        top_k_entropy=top_k,
    )


def log_probability(others: Tensor, log_p_of_rare: Tensor) -> Tensor:
    """log p_y, from the other tokens' probability where p_y is the larger one."""
    return torch.where(others < 0.5, torch.log1p(-others), log_p_of_rare)


def sum_of_squares(tile: Tensor, block: int = 1024) -> Tensor:
    """Row sums of squares without a temporary of the tile's size.

    In blocks, since a CPU's norm adds a whole row up in one go: over 262,144 entries that costs a
    relative error of 2e-5, in blocks 3e-7.
    """
    whole = tile.size(1) // block * block
    blocks = torch.linalg.vector_norm(tile[:, :whole].unflatten(1, (-1, block)), dim=2)
    rest = torch.linalg.vector_norm(tile[:, whole:], dim=1)
    return blocks.square().sum(1) + rest.square()


def top_k_entropy(logits: Tensor, k: int) -> Tensor:
    """Entropy in nats of each row's k largest probabilities, renormalised."""
    largest = logits.topk(min(k, logits.size(1)), dim=1).values
    return torch.special.entr(torch.softmax(largest, dim=1)).sum(1)


def concatenate(tiles: list[TokenStatistics]) -> TokenStatistics:
    """Statistics of all tiles, in order."""

    def join(name: str) -> Tensor | None:
        # Read past the guard against statistics that were not asked for: here None is an answer.
        parts = [tile.__dict__[name] for tile in tiles]
        return None if parts[0] is None else torch.cat(parts)

    log_p = torch.cat([tile.log_p for tile in tiles])
    return TokenStatistics(
        log_p=log_p,
        vocab_size=tiles[0].vocab_size,
        **{name: join(name) for name in ("is_top1", "collision", "entropy", "top_k_entropy")},
    )
