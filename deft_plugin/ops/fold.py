"""From one tile of logits to its sums and the error p - e_y, in place, with PyTorch's operations.

The error's target entry is minus the sum of the other probabilities rather than p_y - 1, and log p_y of
a confident token is log1p of that sum: neither cancels when p_y -> 1. The error is left a factor per row away from
itself, which the caller applies to the product's rows: no pass over the tile is spent on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .projection import LogitsTransform
from .shard import VocabularyShard
from .sums import StatisticsRequest, Sums, statistics_dtype

# Rows folded at a time on a CPU: their logits stay in its cache from one operation to the next.
CPU_ROWS = 32
# Bytes of float32 logits that a top-k entropy is taken of at a time.
TOP_K_BYTES = 32 * 2**20


def fold_(
    logits: Tensor,
    bias: Tensor | None,
    transform: LogitsTransform,
    targets: Tensor,
    request: StatisticsRequest,
    sums: Tensor,
    write_error: bool = True,
    shard: VocabularyShard | None = None,
    limit_error: bool = False,
) -> None:
    """Overwrite raw logits with the error p - e_y up to a factor per row, and fill in the rows' sums.

    Args:
        logits: (n, V), float32 or float64, before bias, scale and softcap; destroyed. -inf entries have p = 0.
        bias: (V,) or None.
        transform: what follows the projection.
        targets: (n,), int64, in [0, V).
        request: optional statistics to compute.
        sums: (6, n), see `Sums`; overwritten.
        write_error: False leaves anything in the logits, for an evaluation.
        shard: which columns of the vocabulary the logits are; None for all. Collective over its group.
        limit_error: keep the error in the range of float16.
    """
    sliced = logits.device.type == "cpu" and shard is None
    step = CPU_ROWS if sliced else max(logits.size(0), 1)
    for start in range(0, logits.size(0), step):
        rows = slice(start, start + step)
        _fold_rows_(
            logits[rows],
            bias,
            transform,
            targets[rows],
            request,
            Sums(*sums[:, rows]),
            write_error,
            shard,
            limit_error,
        )


def _fold_rows_(
    logits: Tensor,
    bias: Tensor | None,
    transform: LogitsTransform,
    targets: Tensor,
    request: StatisticsRequest,
    sums: Sums,
    write_error: bool,
    shard: VocabularyShard | None,
    limit_error: bool,
) -> None:
    if logits.size(1) == 0:
        # A rank without columns takes part with one of probability 0.
        logits, bias = logits.new_full((logits.size(0), 1), -torch.inf), None
        transform, write_error = LogitsTransform(), False
    if bias is not None:
        logits.add_(bias)
    derivative = transform.apply_(logits)
    target = TargetEntry.of(logits, targets, shard)
    largest_logit, target_logit = _max((logits.amax(1), target.read(logits, -torch.inf)), shard)
    offset = target_logit - largest_logit

    difference = logits.sub_(largest_logit.unsqueeze(1))
    if request.entropy:
        # A finite number in place of -inf, which times a power of 0 would be NaN.
        difference = difference.clamp(min=-1e4)
    power = logits.exp_()  # At most 1.
    target.write(power, torch.zeros_like(offset))
    parts = [power.sum(1)]
    parts += [_sum_of_squares(power)] if request.collision else []
    parts += [difference.mul_(power).sum(1)] if request.entropy else []
    others, *parts = _sum(parts, shard)
    if request.collision:
        sums.squares.copy_(parts.pop(0))
    if request.entropy:
        sums.weighted.copy_(parts.pop(0))
    total = others + offset.exp()
    row_factor = total.reciprocal()
    sums.offset.copy_(offset)
    sums.is_top1.copy_(target_logit >= largest_logit)
    sums.others.copy_(others)
    if write_error:
        target.write(power, -others)
        if derivative is not None:
            power.mul_(derivative)
        if limit_error:
            power.mul_(row_factor.unsqueeze(1))
            row_factor = torch.ones_like(row_factor)
    sums.row_factor.copy_(row_factor)


@dataclass(frozen=True)
class TargetEntry:
    """The target's column of each row, where it is among this rank's columns.

    Args:
        columns: (n, 1) int64, in [0, columns of this rank).
        is_here: (n, 1) bool; None where all are.
    """

    columns: Tensor
    is_here: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, shard: VocabularyShard | None) -> TargetEntry:
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


def top_k_entropy(
    logits: Tensor,
    bias: Tensor | None,
    transform: LogitsTransform,
    k: int,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """(n,) entropies in nats of each row's k largest probabilities, renormalised.

    Args:
        logits: (n, V), any floating dtype, before bias, scale and softcap; left as they are.
        bias, transform: what follows the projection.
        k: how many; all where the vocabulary is smaller.
        shard: which columns the logits are; the k largest are among each rank's k largest.
    """
    dtype = statistics_dtype(logits.dtype)
    rows = max(TOP_K_BYTES // (4 * max(logits.size(1), 1)), 1)
    parts = []
    for part in logits.split(rows):
        # A copy, since the transform is in place.
        values = part.to(dtype, copy=True) if bias is None else part.to(dtype) + bias
        transform.apply_(values)
        parts.append(values.topk(min(k, values.size(1)), dim=1).values)
    largest = torch.cat(parts)
    if shard is not None:
        missing = min(k, shard.largest_size) - largest.size(1)
        largest = torch.nn.functional.pad(largest, (0, missing), value=-torch.inf)
        # Ranks have as many rows, so that this is the one collective.
        largest = shard.gather(largest)
        largest = largest.topk(min(k, largest.size(1)), dim=1).values
    return torch.special.entr(torch.softmax(largest, dim=1)).sum(1)
