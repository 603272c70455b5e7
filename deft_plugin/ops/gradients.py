"""Where the tiles' errors are multiplied into: the gradients of the operands, formed in the forward pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .output import gradient_bound
from .products import project_back_
from .projection import Operands
from .sums import statistics_dtype
from .tiles import FoldedTiles, Head, Tile

# Leaving rows out copies those that stay, about 7 % of the product that each of them has to pay for.
SMALLEST_SKIPPED_SHARE = 1 / 8

# Operands with a row per token: the gate comes into their gradients in the backward pass, as a factor per row.
PER_TOKEN = frozenset({"hidden", "low_rank_hidden"})


class Gradients:
    """Buffers of the operands' gradients; None where none is wanted.

    hidden (n, H) and low_rank_hidden (n, r): of the valid tokens alone, in the products' dtype, up to `row_scale`.
    weight (V, H), bias (V,) and low_rank_weight (V, r): whole, in float32 or float64, and in the weight's own
    dtype where one tile holds all tokens.
    """

    def __init__(self, operands: Operands, head: Head, wanted: frozenset[str]) -> None:
        self.head = head
        self.operands = operands
        count = head.targets.numel()
        one_tile = count <= head.tile_rows
        # Only rows that are left out are not overwritten.
        new = torch.zeros if head.skip_below else torch.empty

        def buffer(name: str) -> Tensor | None:
            if name not in wanted:
                return None
            operand = getattr(operands, name)
            if name in PER_TOKEN:
                size = (count, operand.size(1))
                return new(size, dtype=head.product_dtype, device=operand.device)
            dtype = statistics_dtype(head.product_dtype)
            if one_tile and operand.dtype == head.buffer_dtype:
                dtype = operand.dtype
            # The first tile overwrites it.
            return torch.empty_like(operand, dtype=dtype)

        self.hidden = buffer("hidden")
        self.weight = buffer("weight")
        self.bias = buffer("bias")
        self.low_rank_hidden = buffer("low_rank_hidden")
        self.low_rank_weight = buffer("low_rank_weight")
        self._keep = 0
        self.skipped = torch.zeros_like(head.targets, dtype=torch.bool) if head.skip_below else None
        self.wanted = bool(wanted)
        self.need_gate = bool(wanted - PER_TOKEN)

    def tensors(self) -> list[Tensor | None]:
        """The buffers, in the order of `Operands`."""
        return [getattr(self, name) for name in Operands._fields]

    def add(self, tile: Tile, gate: Tensor | None, tiles: FoldedTiles) -> None:
        """Multiply a tile's error into the buffers.

        Args:
            tile: the tile.
            gate: (n,), needed for what has no row per token.
            tiles: where it is from.
        """
        kept = None if gate is None else self._rows_that_earn(tile, gate, tiles)
        self._add_per_token(tile, kept)
        if gate is not None and self.need_gate:
            self._add_per_weight(tile, gate * tile.row_factor * self.head.transform.scale, kept)

    def _add_per_token(self, tile: Tile, kept: Tensor | None) -> None:
        """Put error @ weight into the rows of hidden and low_rank_hidden."""
        gradients = (self.hidden, self.low_rank_hidden)
        if all(gradient is None for gradient in gradients):
            return
        for (_, weight), gradient in zip(self.operands.products(), gradients, strict=False):
            if gradient is None:
                continue
            if kept is None:
                tile.project_back_(gradient[tile.positions], weight)
            else:
                error = tile.error[kept].to(gradient.dtype)
                product = gradient.new_empty(error.size(0), gradient.size(1))
                project_back_(product, error, weight)
                gradient[tile.positions].index_copy_(0, kept, product)

    def _add_per_weight(self, tile: Tile, scale: Tensor, kept: Tensor | None) -> None:
        """Add error.T @ (scale * hidden) to weight and low_rank_weight, and error.T @ scale to bias."""
        rows, scale = self.head.rows_of(tile.positions), scale.unsqueeze(1)
        if kept is not None:
            tile, scale = replace(tile, error=tile.error[kept]), scale[kept]
            rows = kept + rows.start if isinstance(rows, slice) else rows[kept]
        gradients = (self.weight, self.low_rank_weight)
        for (hidden, _), gradient in zip(self.operands.products(), gradients, strict=False):
            if gradient is not None:
                scaled = (hidden[rows] * scale).to(tile.error.dtype)
                tile.add_outer_(gradient, self._keep, scaled)
        if self.bias is not None:
            tile.add_outer_(self.bias.unsqueeze(1), self._keep, scale.to(tile.error.dtype))
        self._keep = 1

    def _rows_that_earn(self, tile: Tile, gate: Tensor, tiles: FoldedTiles) -> Tensor | None:
        """Rows of the tile whose gradient is worth a product; None for all. Synchronises with the host."""
        if self.skipped is None:
            return None
        bound = gradient_bound(tiles.statistics(tile.positions).log_p, gate)
        # Written so that NaN is kept.
        skipped = bound < self.head.skip_below * bound.mean()
        kept = (~skipped).nonzero().squeeze(1)
        if kept.numel() > (1 - SMALLEST_SKIPPED_SHARE) * bound.numel():
            return None
        self.skipped[tile.positions] = skipped
        return kept
