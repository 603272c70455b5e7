"""Where the tiles' errors are multiplied into: the gradients of the operands, formed in the forward pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .folded_tiles import FoldedTiles
from .plan import Plan
from .projection import Operands
from .skipping import Kept, row_masses, what_earns
from .sums import statistics_dtype
from .tiles import Tile

# Operands with a row per token: the gate comes into their gradients in the backward pass, as a factor per row.
PER_TOKEN = frozenset({"hidden", "low_rank_hidden"})


class Gradients:
    """Buffers of the operands' gradients; None where none is wanted.

    hidden (n, H) and low_rank_hidden (n, r): of the valid tokens alone, in the products' dtype, up to `row_scale`.
    weight (V, H), bias (V,) and low_rank_weight (V, r): whole, in float32 or float64, and in the weight's own
    dtype where one tile holds all tokens.
    """

    def __init__(self, operands: Operands, plan: Plan, wanted: frozenset[str]) -> None:
        self.plan = plan
        self.operands = operands
        count = plan.targets.numel()
        one_tile = count <= plan.tile_rows
        # Without skipping, tiles overwrite all rows, and the first one the whole weight's gradient.
        new = torch.zeros if plan.skip_below else torch.empty

        def buffer(name: str) -> Tensor | None:
            if name not in wanted:
                return None
            operand = getattr(operands, name)
            if name in PER_TOKEN:
                size = (count, operand.size(1))
                return new(size, dtype=plan.product_dtype, device=operand.device)
            dtype = statistics_dtype(plan.product_dtype)
            if one_tile and operand.dtype == plan.buffer_dtype:
                dtype = operand.dtype
            return new(operand.shape, dtype=dtype, device=operand.device)

        self.hidden = buffer("hidden")
        self.weight = buffer("weight")
        self.bias = buffer("bias")
        self.low_rank_hidden = buffer("low_rank_hidden")
        self.low_rank_weight = buffer("low_rank_weight")
        self._keep = 1 if plan.skip_below else 0
        self.wanted = bool(wanted)
        self.skipped = (
            torch.zeros_like(plan.targets, dtype=statistics_dtype(plan.product_dtype))
            if plan.skip_below and self.wanted
            else None
        )
        self.need_gate = bool(wanted - PER_TOKEN)

    def tensors(self) -> list[Tensor | None]:
        """The buffers, in the order of `Operands`."""
        return [getattr(self, name) for name in Operands._fields]

    def add(self, tile: Tile, gate: Tensor | None, tiles: FoldedTiles) -> None:
        """Multiply a tile's error into the buffers.

        Args:
            tile: the tile.
            gate: (n,), needed for what has no row per token, and for skipping.
            tiles: where it is from.
        """
        plan, vocab_size = self.plan, self.plan.vocab_size
        kept, scale = Kept(vocab_size), None
        if gate is not None:
            factor = gate * plan.transform.scale
            scale = factor * tile.row_factor
        if self.skipped is not None:
            assert scale is not None
            bound = row_masses(tiles.statistics(tile.positions).log_p, factor)
            targets = plan.targets[tile.positions]
            kept = what_earns(tile.error, scale, bound, targets, plan.skip_below, plan.shard)
            self.skipped[tile.positions] = kept.skipped_share(scale.numel(), vocab_size)
            tile = replace(tile, error=kept.of_error(tile.error))
        self._add_per_token(tile, kept)
        if self.need_gate:
            assert scale is not None
            self._add_per_weight(tile, scale.unsqueeze(1), kept)

    def _add_per_token(self, tile: Tile, kept: Kept) -> None:
        """Put error @ weight into the rows of hidden and low_rank_hidden."""
        gradients = (self.hidden, self.low_rank_hidden)
        if all(gradient is None for gradient in gradients):
            return
        for (_, weight), gradient in zip(self.operands.products(), gradients, strict=False):
            if gradient is None:
                continue
            weight, rows = kept.of_columns(weight), gradient[tile.positions]
            if kept.rows is None:
                tile.project_back_(rows, weight)
            else:
                product = gradient.new_empty(kept.rows.numel(), gradient.size(1))
                tile.project_back_(product, weight)
                rows.index_copy_(0, kept.rows, product)

    def _add_per_weight(self, tile: Tile, scale: Tensor, kept: Kept) -> None:
        """Add error.T @ (scale * hidden) to weight and low_rank_weight, and error.T @ scale to bias; scale is (n, 1)."""
        rows, scale = self.plan.rows_of(tile.positions), kept.of_rows(scale)
        dtype = tile.error.dtype
        for (hidden, _), gradient in zip(
            self.operands.products(), (self.weight, self.low_rank_weight), strict=False
        ):
            if gradient is not None:
                scaled = kept.of_rows(hidden[rows]) * scale
                self._add_outer(gradient, tile, scaled.to(dtype), kept)
        if self.bias is not None:
            self._add_outer(self.bias.unsqueeze(1), tile, scale.to(dtype), kept)
        self._keep = 1

    def _add_outer(self, gradient: Tensor, tile: Tile, scaled: Tensor, kept: Kept) -> None:
        """Add error.T @ scaled, (k, H), to the rows of the vocabulary entries that stay."""
        if kept.columns is None:
            tile.add_outer_(gradient, self._keep, scaled)
            return
        product = gradient.new_empty(kept.columns.numel(), gradient.size(1))
        tile.add_outer_(product, 0, scaled)
        gradient.index_add_(0, kept.columns, product)
