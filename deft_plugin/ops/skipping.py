"""Error-bounded skipping: which tokens and vocabulary entries a tile leaves out of the gradients' products.

The gradient of a tile in its logits is gate * (p - e_y), and most of its entries are next to nothing: a model that
knows its language gives nearly all of the probability to a small part of the vocabulary. So the columns with the
smallest masses, sums of absolute values over the tile's tokens, leave the products: those that hold at most a given
share of the whole tile's mass together. What is lost is then at most that share of the gradient in the logits, in the
L1 norm and whatever the distribution. Targets' columns always stay. Where many tokens have next to no gradient, as
those that a gate silences or that are learnt, they leave as well, within the same share.

    total mass = sum over i, v of |gate_i (p_iv - [v = y_i])|  =  2 sum over i of |gate_i| (1 - p_i)   without a softcap
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .fold import TargetEntry
from .products import add_outer_
from .shard import VocabularyShard

# Fewer than these leave nothing out: what stays of columns is copied, of the error and of the weight, and so are rows.
SMALLEST_COLUMNS_SHARE = 1 / 4
SMALLEST_ROWS_SHARE = 1 / 8
# Most of the allowed share that goes to rows. Many of them have next to nothing where a model is sure of its tokens,
# and little is enough for those; columns are what most is saved by.
ROWS_PART = 1 / 4
# On an accelerator the columns that stay, on all ranks together, are a multiple of this, for the products' sake.
COLUMNS_MULTIPLE = 64
# Columns that are copied in float32 at a time.
BLOCK_COLUMNS = 8192


@dataclass(frozen=True)
class Kept:
    """What a tile's products are taken of.

    Args:
        column_count: number of vocabulary entries that stay, on all ranks together.
        rows: (k,) int64, ascending; None for all of the tile's rows.
        columns: (c,) int64, ascending, of this rank's; None for all of them.
    """

    column_count: int
    rows: Tensor | None = None
    columns: Tensor | None = None

    def of_error(self, error: Tensor) -> Tensor:
        """(k, c) of (n, V)."""
        # Columns are most of it.
        return self.of_rows(self.of_columns(error, 1))

    def of_rows(self, tensor: Tensor) -> Tensor:
        """The rows that stay of a tensor with a row per token."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)

    def of_columns(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The entries that stay of a tensor with one per vocabulary entry in `dim`."""
        return tensor if self.columns is None else tensor.index_select(dim, self.columns)

    def skipped_share(self, row_count: int, vocab_size: int) -> Tensor | float:
        """Of each row: (n,), or one number, the share of its vocabulary that is left out."""
        share = 1 - self.column_count / vocab_size
        if self.rows is None:
            return share
        shares = torch.ones(row_count, device=self.rows.device)
        return shares.index_fill_(0, self.rows, share)


def what_earns(
    error: Tensor,
    row_scale: Tensor,
    row_bound: Tensor,
    targets: Tensor,
    share: float,
    shard: VocabularyShard | None = None,
) -> Kept:
    """The rows and columns of a tile that stay; what goes holds at most `share` of the tile's mass.

    Up to the rounding of `error`'s dtype. All stay where something is NaN, or every gate 0. Synchronises with the host once.

    Args:
        error: (n, V), up to `row_scale`; at least 0 but in the targets' columns.
        row_scale: (n,), the factors on the error's rows, gates included; any sign.
        row_bound: (n,), at least the rows' masses (`row_masses`; a softcap makes them smaller).
        targets: (n,) int64, in [0, V).
        share: in (0, 1).
        shard: which columns of the vocabulary the error is of; what stays is the same on all ranks. Collective.
    """
    row_total, vocab_size = error.size(0), error.size(1) if shard is None else shard.vocab_size
    if row_total == 0:
        return Kept(vocab_size)
    row_scale = row_scale.abs()
    # Half precision has little room.
    largest = row_scale.max()
    row_scale, row_bound = row_scale / largest, row_bound / largest
    masses = column_masses(error, row_scale, TargetEntry.of(error, targets, shard))
    if shard is not None:
        masses = functional.pad(masses, (0, shard.largest_size - masses.numel()))
        masses = shard.gather(masses.unsqueeze(0))[0, :vocab_size]
    allowed = share * masses.sum()

    row_bound, row_order = row_bound.sort()
    lost = row_bound.cumsum(0)
    row_count = (lost <= ROWS_PART * allowed).sum()
    row_count = row_count * (row_count >= SMALLEST_ROWS_SHARE * row_total)
    leaves = torch.arange(row_total, device=row_bound.device) < row_count
    lost_by_rows = torch.where(leaves, row_bound, 0).sum()
    masses[targets] = torch.inf
    masses, column_order = masses.sort()
    column_count = (masses.cumsum(0) <= allowed - lost_by_rows).sum()
    rows, columns = torch.stack((row_count, column_count)).tolist()

    if error.device.type != "cpu":
        columns = max(columns - (columns - vocab_size) % COLUMNS_MULTIPLE, 0)
    if columns < SMALLEST_COLUMNS_SHARE * vocab_size:
        columns = 0
    kept = column_order[columns:].sort().values if columns else None
    if kept is not None and shard is not None:
        kept = kept[(kept >= shard.first) & (kept < shard.first + shard.size)] - shard.first
    return Kept(
        vocab_size - columns, rows=row_order[rows:].sort().values if rows else None, columns=kept
    )


def row_masses(log_p: Tensor, factor: Tensor) -> Tensor:
    """(n,) sums of absolute values of factor * (p - e_y): 2 |factor| (1 - p)."""
    return -2 * factor.abs() * torch.expm1(log_p)


def column_masses(error: Tensor, row_scale: Tensor, targets: TargetEntry) -> Tensor:
    """(V,) sums of absolute values of row_scale * error, in float32 or float64."""
    masses = row_scale.new_empty(error.size(1))
    if not error.size(1):
        return masses
    if error.dtype == torch.float16:
        # Whose range is too small for gates.
        for block, columns in zip(
            masses.split(BLOCK_COLUMNS), error.split(BLOCK_COLUMNS, 1), strict=True
        ):
            torch.mv(columns.t().to(masses.dtype), row_scale, out=block)
    else:
        add_outer_(masses.unsqueeze(1), 0, error, row_scale.unsqueeze(1).to(error.dtype))
    # The targets' entries are negative.
    entries = targets.read(error, 0).to(row_scale.dtype)
    return masses.index_add_(0, targets.columns.squeeze(1), -2 * row_scale * entries)
