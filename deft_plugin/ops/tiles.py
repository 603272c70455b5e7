"""Tiles of logits: how many rows they have, and their projection and folding in one buffer, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..objectives import TokenStatistics
from .fold import fold_, top_k_entropy
from .plan import Plan
from .products import add_outer_, add_product_, project_, project_back_
from .projection import Operands
from .sums import empty_sums, statistics_of_sums

# Bytes of logits held at once. A product pays for reading the weight once a tile, and a trainable lm_head also for reading
# and writing the whole weight's gradient.
CPU_TILE_BYTES = 64 * 2**20
GPU_TILE_BYTES = 2**30
# Skipping copies a part of the weight once a tile.
SKIPPING_CPU_TILE_BYTES = 128 * 2**20
# With a frozen lm_head more rows are 1 to 7 % faster on a H100, and as many times larger in memory.
FROZEN_TILE_ROWS = 1024
SMALLEST_TILE_ROWS = 16
TILE_ROWS_MULTIPLE = 128


@dataclass(frozen=True)
class Tile:
    """One tile after folding; the next one overwrites its error.

    Args:
        positions: where its tokens are among the valid ones.
        error: (n, V), p - e_y times the softcap's derivative, up to the sums' `row_factor`.
        row_factor: (n,).
    """

    positions: slice
    error: Tensor
    row_factor: Tensor

    def project_back_(self, gradient: Tensor, weight: Tensor) -> None:
        """gradient = error @ weight; (n, H) and (V, H) of the products' dtype."""
        project_back_(gradient, self.error.to(gradient.dtype), weight)

    def add_outer_(self, gradient: Tensor, keep: int, hidden: Tensor) -> None:
        """gradient = keep * gradient + error.T @ hidden; (V, H) and (n, H), the latter of the error's dtype."""
        add_outer_(gradient, keep, self.error, hidden)


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


def tile_positions(count: int, tile_rows: int) -> Iterator[slice]:
    """Where each tile is among `count` tokens; one tile, if empty, at least."""
    for start in range(0, max(count, 1), tile_rows):
        yield slice(start, min(start + tile_rows, count))


def default_tile_rows(
    count: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    trainable: bool = False,
    skipping: bool = False,
) -> int:
    """Tokens per tile of `count` tokens, in as few tiles as fit the device's buffer, all of about equal size.

    Args:
        dtype: of the buffer's logits.
        trainable: whether the lm_head's gradient is wanted.
        skipping: whether the gradients' products leave something out.
    """
    on_cpu = device.type == "cpu"
    cpu_tile_bytes = SKIPPING_CPU_TILE_BYTES if skipping else CPU_TILE_BYTES
    tile_bytes = cpu_tile_bytes if on_cpu else GPU_TILE_BYTES
    most_rows = max(tile_bytes // (max(vocab_size, 1) * dtype.itemsize), SMALLEST_TILE_ROWS)
    if not (on_cpu or trainable or skipping):
        most_rows = min(most_rows, FROZEN_TILE_ROWS)
    tiles = max(-(-count // most_rows), 1)
    rows = max(-(-count // tiles), 1)
    if rows > TILE_ROWS_MULTIPLE:
        rows = min(-(-rows // TILE_ROWS_MULTIPLE) * TILE_ROWS_MULTIPLE, most_rows)
    return rows
