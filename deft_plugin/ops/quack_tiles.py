"""Tiles whose logits never exist: QuACK's product leaves exponentials, and its other products read them.

The same walk as `FoldedTiles`, with two launches in place of a product and a fold:

    exponentials, sums of each block   of hidden @ weight.T       quack_kernels.exponentials
    sums of each row, the error        (6, n), in place           quack_sums.sums_and_error_

A block is what a thread block of the product makes of a row, `width` columns of it. On Hopper the error stays relative to
each block's own power of two, and QuACK's products of the gradients bring it to the row's. They read it in rows of 128, so
that rows are added whose hidden states are zero. On Blackwell, where QuACK 0.6 has no such products, the exponentials are
brought to the row's reference in place, and it is a tile like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from .plan import Plan
from .projection import Operands
from .quack_sums import STRIP_COLUMNS, block_scales, sums_and_error_
from .tiles import Tile, tile_positions

ROW_MULTIPLE = 128
# Columns of a block, the fastest first, by major compute capability: what QuACK has measured on Hopper for its own
# loss, and its default on Blackwell.
HOPPER_WIDTHS = (192, 256, 128)
BLACKWELL_WIDTHS = (256, 192, 128)


@dataclass(frozen=True)
class StripTile(Tile):
    """A tile whose error is up to one factor more for each 64 columns of a row.

    Args:
        powers: (m, V), bfloat16; `error` is its first n rows. m is n rounded up to a multiple of 128.
        strips: (V / 64, m), bfloat16, the factors.
    """

    powers: Tensor
    strips: Tensor

    def project_back_(self, gradient: Tensor, weight: Tensor) -> None:
        from .quack_kernels import project_back_

        count = gradient.size(0)
        whole = gradient
        if count != self.powers.size(0):
            whole = gradient.new_empty(self.powers.size(0), gradient.size(1))
        project_back_(whole, self.powers, self.strips, weight)
        if whole is not gradient:
            gradient.copy_(whole[:count])

    def add_outer_(self, gradient: Tensor, keep: int, hidden: Tensor) -> None:
        from .quack_kernels import add_outer_

        add_outer_(gradient, keep, self.powers, self.strips, _whole_rows(hidden))


def quack_tiles(operands: Operands, plan: Plan, sums: Tensor, write_error: bool) -> Iterator[Tile]:
    """As `FoldedTiles.__call__`, on a GPU where `availability.refuse_where_quack_cannot` raises nothing.

    Args:
        operands: hidden and weight, the weight in bfloat16.
        plan: the rest of the call.
        sums: (6, count), filled in tile by tile.
        write_error: whether the tiles' errors are wanted beside their statistics.
    """
    from .quack_kernels import exponentials, takes_strips

    weight, count = operands.weight, plan.targets.numel()
    vocab_size, request = weight.size(0), plan.request
    with_strips = takes_strips(weight.device)
    width = block_width(vocab_size, HOPPER_WIDTHS if with_strips else BLACKWELL_WIDTHS)
    rows = -(-min(plan.tile_rows, count) // ROW_MULTIPLE) * ROW_MULTIPLE
    buffer = weight.new_empty(rows if write_error else 0, vocab_size)
    for positions in tile_positions(count, plan.tile_rows):
        targets, tile_sums = plan.targets[positions], sums[:, positions]
        size = targets.numel()
        error = buffer[:size]
        if size:
            hidden = _whole_rows(operands.hidden[plan.rows_of(positions)].to(weight.dtype))
            # A target that no column has is looked for in vain.
            padded_targets = functional.pad(targets, (0, hidden.size(0) - size), value=-1)
            powers = buffer[: hidden.size(0)] if write_error else None
            partials = exponentials(powers, hidden, weight, padded_targets, width, request)
            sums_and_error_(tile_sums, partials, targets, width, request, powers)
            if powers is not None:
                scales = block_scales(partials.exponents, powers.dtype)
                if with_strips:
                    strips = _strips(scales, width)
                    yield StripTile(positions, error, tile_sums[-1], powers, strips)
                    continue
                powers.unflatten(1, (-1, width)).mul_(scales.unsqueeze(2))
        yield Tile(positions, error, tile_sums[-1])


def block_width(vocab_size: int, widths: tuple[int, ...]) -> int:
    """Columns of a block: the first of `widths` that divides the vocabulary."""
    return next(width for width in widths if vocab_size % width == 0)


def _strips(scales: Tensor, width: int) -> Tensor:
    """(V / 64, m), contiguous, of (m, B) scales: each as often as a block has 64 columns."""
    times = width // STRIP_COLUMNS
    strips = scales.t().unsqueeze(1).expand(-1, times, -1)
    # Of a single block, a reshape alone would be a view.
    return strips.reshape(-1, scales.size(0)).contiguous()


def _whole_rows(rows: Tensor) -> Tensor:
    """With rows of zeros up to a multiple of 128, contiguous."""
    missing = -rows.size(0) % ROW_MULTIPLE
    return (functional.pad(rows, (0, 0, 0, missing)) if missing else rows).contiguous()
