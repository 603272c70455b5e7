"""What a call computes, and how: all that is settled before the first product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..objectives import Objective
from .projection import LogitsTransform
from .settings import TiledPath
from .shard import VocabularyShard
from .sums import StatisticsRequest, statistics_dtype


@dataclass(frozen=True)
class Plan:
    """The constant half of a call: everything but the operands, which have gradients.

    Args:
        objective, transform, request: what to compute.
        targets: (n,) int64.
        rows: (n,) int64 rows of `hidden` that the targets belong to; None for all of them.
        vocab_size: number of logits of a token, V, on all ranks together.
        product_dtype: dtype of the matrix products (the autocast dtype under autocast).
        tile_rows: number of tokens per tile.
        path: what makes, folds and multiplies the tiles.
        skip_below: the share of a tile's gradient in its logits that the products may lose; 0 for none.
        shard: which part of the vocabulary the weight is; None for all of it.
    """

    objective: Objective
    transform: LogitsTransform
    request: StatisticsRequest
    targets: Tensor
    rows: Tensor | None
    vocab_size: int
    product_dtype: torch.dtype
    tile_rows: int
    path: TiledPath
    skip_below: float = 0.0
    shard: VocabularyShard | None = None

    @property
    def buffer_dtype(self) -> torch.dtype:
        """Of a tile's logits."""
        return buffer_dtype(self.product_dtype, self.path)

    def rows_of(self, positions: slice) -> Tensor | slice:
        """Which rows of `hidden` the tokens at these positions are."""
        return positions if self.rows is None else self.rows[positions]


def buffer_dtype(product_dtype: torch.dtype, path: TiledPath) -> torch.dtype:
    """Of a tile's logits: the products' own, as a model's own logits are, or what PyTorch folds in."""
    return statistics_dtype(product_dtype) if path == "chunked" else product_dtype
