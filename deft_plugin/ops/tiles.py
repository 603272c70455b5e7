"""Tiles of logits: how many rows they have, and what is multiplied of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .products import add_outer_, project_back_

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
