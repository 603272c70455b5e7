"""The walk over a call's tiles: projected and folded in one buffer, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..objectives import TokenStatistics
from .fold import fold_, top_k_entropy
from .plan import Plan
from .products import add_product_, project_
from .projection import Operands
from .sums import empty_sums, statistics_of_sums
from .tiles import Tile, tile_positions


class FoldedTiles:
    """The tiles of a call, and what is known of their tokens once they are folded.

    Args:
        operands: with weights in the products' dtype.
        plan: the rest of the call.
    """

    def __init__(self, operands: Operands, plan: Plan) -> None:
        self.operands, self.plan = operands, plan
        count = plan.targets.numel()
        self.sums = empty_sums(count, plan.buffer_dtype, operands.weight.device)
        self.top_k = self.sums.new_empty(count) if plan.request.top_k else None

    def __call__(self, write_error: bool) -> Iterator[Tile]:
        """Project and fold one tile after the other.

        Args:
            write_error: whether the tiles' errors are wanted beside their statistics.
        """
        plan, bias = self.plan, self.operands.bias
        if plan.path == "quack":
            from .quack_tiles import quack_tiles

            yield from quack_tiles(self.operands, plan, self.sums, write_error)
            return
        vocab_size = self.operands.weight.size(0)
        row_size = vocab_size
        if plan.path == "triton":
            from .triton_fold import padded_vocab_size

            row_size = padded_vocab_size(vocab_size)
            if bias is not None:
                bias = torch.nn.functional.pad(bias, (0, row_size - vocab_size)).contiguous()
        buffer = torch.empty(
            min(plan.tile_rows, plan.targets.numel()),
            row_size,
            dtype=plan.buffer_dtype,
            device=self.operands.weight.device,
        )
        for positions in tile_positions(plan.targets.numel(), plan.tile_rows):
            rows = buffer[: positions.stop - positions.start]
            self._project(positions, rows[:, :vocab_size])
            self._fold(positions, rows, bias, write_error)
            yield Tile(positions, rows[:, :vocab_size], self.sums[-1, positions])

    def statistics(self, positions: slice = slice(None)) -> TokenStatistics:
        """Of the tokens at these positions, which have been folded."""
        return statistics_of_sums(
            self.sums[:, positions],
            self.plan.vocab_size,
            self.plan.request,
            None if self.top_k is None else self.top_k[positions],
        )

    def _project(self, positions: slice, logits: Tensor) -> None:
        """Put hidden @ weight.T + low_rank_hidden @ low_rank_weight.T into (n, V) logits."""
        rows, dtype = self.plan.rows_of(positions), self.plan.product_dtype
        (hidden, weight), *low_rank = self.operands.products()
        if logits.dtype == dtype:
            project_(logits, hidden[rows].to(dtype), weight)
        else:
            logits.copy_(hidden[rows].to(dtype) @ weight.t())
        for hidden, weight in low_rank:
            add_product_(logits, 1, hidden[rows].to(dtype), weight.t())

    def _fold(self, positions: slice, rows: Tensor, bias: Tensor | None, write_error: bool) -> None:
        plan = self.plan
        transform, request, shard = plan.transform, plan.request, plan.shard
        targets, sums = plan.targets[positions], self.sums[:, positions]
        vocab_size = self.operands.weight.size(0)
        if self.top_k is not None:
            assert request.top_k is not None
            self.top_k[positions] = top_k_entropy(
                rows[:, :vocab_size], self.operands.bias, transform, request.top_k, shard
            )
        if plan.path == "triton":
            from .triton_fold import triton_fold_

            triton_fold_(rows, vocab_size, bias, transform, targets, request, sums, write_error)
            return
        limit_error = plan.product_dtype == torch.float16
        fold_(rows, bias, transform, targets, request, sums, write_error, shard, limit_error)
