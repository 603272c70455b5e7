"""From one tile of logits to token statistics and the error p - e_y, in place, with PyTorch's operations.

The error's target entry is minus the sum of the other probabilities rather than p_y - 1, and log p_y of
a confident token is log1p of that sum: neither cancels when p_y -> 1. The error is left a factor per row away from
itself, which the caller applies to the product's rows: no pass over the tile is spent on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..objectives import Objective, TokenStatistics
from .shard import VocabularyShard


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
    logits: Tensor,
    targets: Tensor,
    request: StatisticsRequest,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, TokenStatistics]:
    """Overwrite `logits` with the error p - e_y up to a factor per row.

    Args:
        logits: (n, V), float32 or float64, contiguous; destroyed. -inf entries have p = 0. A row
            with NaN or +inf, or with nothing but -inf, has NaN statistics.
        targets: (n,), int64, in [0, V).
        request: optional statistics to compute.
        shard: which columns of the vocabulary the logits are; None for all. Collective over its group.

    Returns:
        The error (n, V), of magnitude up to V; the factor (n,) of its rows; the statistics.
    """
    if logits.size(1) == 0:
        # A rank without tokens takes part with one of probability 0.
        padded = logits.new_full((logits.size(0), 1), -torch.inf)
        _, row_factor, statistics = fold_logits_(padded, targets, request, shard)
        return logits, row_factor, statistics
    target = _Entry.of(logits, targets, shard)
    largest_logit, target_logit = _max((logits.amax(1), target.read(logits, -torch.inf)), shard)
    top_k = _top_k_entropy(logits, request.top_k, shard) if request.top_k else None

    weights = logits.sub_(largest_logit.unsqueeze(1)).exp_()  # At most 1.
    parts = [_sum_of_squares(weights)] if request.collision else []
    parts += [torch.special.entr(weights).sum(1)] if request.entropy else []
    target.write(weights, torch.zeros_like(target_logit))
    others, *parts = _sum((weights.sum(1), *parts), shard)
    target.write(weights, -others)

    relative_logit = target_logit - largest_logit
    total = others + relative_logit.exp()
    missed = others / total
    statistics = TokenStatistics(
        log_p=torch.where(missed < 0.5, torch.log1p(-missed), relative_logit - total.log()),
        vocab_size=logits.size(1) if shard is None else shard.vocab_size,
        # Without the maximum's NaN, which a reduction may have lost.
        is_top1=(target_logit >= largest_logit) & ~total.isnan(),
        collision=parts.pop(0) / total.square() if request.collision else None,
        # Two terms >= 0, so that nothing cancels.
        entropy=total.log() + parts.pop(0) / total if request.entropy else None,
        top_k_entropy=top_k,
    )
    return weights, total.reciprocal(), statistics


@dataclass(frozen=True)
class _Entry:
    """The target's column of each row, where it is among this rank's columns.

    Args:
        columns: (n, 1) int64, in [0, columns of this rank).
        is_here: (n, 1) bool; None where all are.
    """

    columns: Tensor
    is_here: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, shard: VocabularyShard | None) -> _Entry:
        if shard is None:
            return cls(targets.unsqueeze(1), None)
        columns = (targets - shard.first).unsqueeze(1)
        is_here = (columns >= 0) & (columns < logits.size(1))
        return cls(columns.clamp(0, logits.size(1) - 1), is_here)

    def read(self, tile: Tensor, absent: float) -> Tensor:
        """(n,) entries, `absent` where the column is another rank's."""
        values = tile.gather(1, self.columns)
        if self.is_here is not None:
            values = values.masked_fill(~self.is_here, absent)
        return values.squeeze(1)

    def write(self, tile: Tensor, values: Tensor) -> None:
        """Put (n,) values where the column is this rank's."""
        values = values.unsqueeze(1)
        if self.is_here is not None:
            values = torch.where(self.is_here, values, tile.gather(1, self.columns))
        tile.scatter_(1, self.columns, values)


def _max(values: Sequence[Tensor], shard: VocabularyShard | None) -> Sequence[Tensor]:
    return values if shard is None else shard.max_(torch.stack(list(values))).unbind()


def _sum(values: Sequence[Tensor], shard: VocabularyShard | None) -> Sequence[Tensor]:
    return values if shard is None else shard.sum_(torch.stack(list(values))).unbind()


def _sum_of_squares(tile: Tensor, block: int = 1024) -> Tensor:
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


def _top_k_entropy(logits: Tensor, k: int, shard: VocabularyShard | None) -> Tensor:
    """`top_k_entropy` of the whole vocabulary: the k largest are among each rank's k largest."""
    if shard is None:
        return top_k_entropy(logits, k)
    largest = logits.topk(min(k, logits.size(1)), dim=1).values
    missing = min(k, shard.largest_size) - largest.size(1)
    largest = torch.nn.functional.pad(largest, (0, missing), value=-torch.inf)
    return top_k_entropy(shard.gather(largest), k)


def concatenate(tiles: list[TokenStatistics]) -> TokenStatistics:
    """Statistics of all tiles, in order."""
    parts = zip(*(tile.tensors() for tile in tiles), strict=True)
    joined = [None if part[0] is None else torch.cat(part) for part in parts]
    return TokenStatistics.of_tensors(tiles[0].vocab_size, *joined)
