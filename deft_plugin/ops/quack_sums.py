"""From what a product's epilogue leaves of each tile of a row to the row's sums, and the target's entry of the error.

The epilogue knows nothing of targets: its sums are over all columns, each tile's relative to a power of two of its own.
Here tiles meet in a common reference, and the target leaves:

    rest = sum of its tile - e_y                   where that cancels no more than 12 bits
         = sum of the stored e_v, v != y           where the target is nearly all of its tile

The second is rounded to bfloat16 and off by 2^-9 at most, of something at most 2^-12 of the whole: 1 - p_y stays within
5e-7 of the truth, as float32 logits have it, and within 2^-9 of itself however near to 0 it is. Without stored
exponentials, in an evaluation, the difference is all there is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .sums import Sums

# log2(e) as the kernel has it, in float32.
LOG2_E = torch.tensor(math.log2(math.e), dtype=torch.float32).item()
# Columns that have one scale in QuACK's products of the gradients.
STRIP_COLUMNS = 64
# Share of a tile's sum below which the target's complement is summed anew.
SMALLEST_DIFFERENCE = 2.0**-12
# A target's tile is at most this far below the row's largest, or its entry of the error would leave bfloat16's range.
LOWEST_EXPONENT = 64


class Partials(NamedTuple):
    """What is known of each tile of each row, in float32; T tiles a row.

    With z a logit, k the tile's exponent, e = 2^(log2(e) z - k):

    Args:
        exponents: (n, T), the integers k.
        maxima: (n, T), largest z.
        powers: (n, T), sums of e.
        squares: (n, T), sums of e^2; None unless requested.
        weighted: (n, T), sums of e log2(e); None unless requested.
        target_logit: (n,), z of the target.
    """

    exponents: Tensor
    maxima: Tensor
    powers: Tensor
    squares: Tensor | None
    weighted: Tensor | None
    target_logit: Tensor

    def of_rows(self, count: int) -> Partials:
        """Of the first `count` rows; views."""
        return Partials._make(None if part is None else part[:count] for part in self)


def sums_of_partials_(
    sums: Tensor, partials: Partials, targets: Tensor, width: int, powers: Tensor | None
) -> None:
    """Fill in the rows' sums.

    Args:
        sums: (6, n), see `Sums`; `row_factor` is for the error relative to the row's largest exponent.
        partials: of n rows.
        targets: (n,), int64, in [0, V).
        width: of a tile, in columns.
        powers: (n, V), the stored exponentials as the epilogue left them; None where there are none.
    """
    out = Sums(*sums)
    home = (targets // width).unsqueeze(1)
    exponents, target_logit = partials.exponents, partials.target_logit

    # In float64, since the kernel's multiply-add rounds once where two operations here would round twice.
    target_exponent = exponents.gather(1, home).squeeze(1)
    target_difference = (target_logit.double() * LOG2_E - target_exponent.double()).float()
    target_power = target_difference.exp2()
    target_weighted = target_power * target_difference.clamp(min=-1e4)

    stored: list[Tensor | None] = [None, None, None]
    if powers is not None:
        block = powers.gather(1, _columns(home, width)).float()
        block.scatter_(1, (targets % width).unsqueeze(1), 0)
        stored = [
            block.sum(1),
            block.square().sum(1),
            (block * block.log2().clamp(min=-1e4)).sum(1),
        ]
    cancels = _without(partials.powers, home, target_power) < SMALLEST_DIFFERENCE * (
        partials.powers.gather(1, home).squeeze(1)
    )

    def others(all_: Tensor, target: Tensor, again: Tensor | None) -> Tensor:
        """(n, T): the sums with the target left out of its tile's."""
        rest = _without(all_, home, target)
        if again is not None:
            rest = torch.where(cancels, again, rest)
        return all_.scatter(1, home, rest.unsqueeze(1))

    maximum = partials.maxima.amax(1)
    reference = maximum * LOG2_E
    shift = exponents - reference.unsqueeze(1)
    scale = shift.exp2()
    # A difference may be less than 0 by its rounding.
    other_powers = others(partials.powers, target_power, stored[0]).clamp(min=0)
    out.offset.copy_(target_logit - maximum)
    out.is_top1.copy_(target_logit >= maximum)
    out.others.copy_((other_powers * scale).sum(1))
    if partials.squares is not None:
        squares = others(partials.squares, target_power.square(), stored[1])
        out.squares.copy_((squares * scale.square()).sum(1))
    if partials.weighted is not None:
        weighted = others(partials.weighted, target_weighted, stored[2])
        weighted = (weighted + other_powers * shift) * scale
        out.weighted.copy_(weighted.sum(1) / LOG2_E)
    total = out.others + out.offset.exp()
    out.row_factor.copy_((exponents.amax(1) - reference).exp2() / total)


def put_target_(
    powers: Tensor, partials: Partials, sums: Tensor, targets: Tensor, width: int
) -> None:
    """Make the stored exponentials the error: minus the others' sum where the target is, in its tile's reference.

    A tile far below the row's largest is first brought nearer, and its exponent with it.

    Args:
        powers: (n, V), bfloat16; changed in the targets' tiles.
        partials: of n rows; `exponents` change with the tiles.
        sums: (6, n), filled in.
        targets: (n,), int64, in [0, V).
        width: of a tile, in columns.
    """
    others, exponents = Sums(*sums).others, partials.exponents
    home = (targets // width).unsqueeze(1)
    exponent = exponents.gather(1, home)
    nearer = torch.maximum(exponent, exponents.amax(1, keepdim=True) - LOWEST_EXPONENT)
    columns = _columns(home, width)
    block = powers.gather(1, columns) * (exponent - nearer).exp2().to(powers.dtype)
    reference = (partials.maxima.amax(1) * LOG2_E).unsqueeze(1)
    entry = -others.unsqueeze(1) * (reference - nearer).exp2()
    block.scatter_(1, (targets % width).unsqueeze(1), entry.to(powers.dtype))
    powers.scatter_(1, columns, block)
    exponents.scatter_(1, home, nearer)


def tile_scales(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, T) powers of two that bring each tile to the row's largest exponent; exact in any floating dtype."""
    return (exponents - exponents.amax(1, keepdim=True)).exp2().to(dtype)


def _columns(home: Tensor, width: int) -> Tensor:
    """(n, width) columns of each row's target tile."""
    return home * width + torch.arange(width, device=home.device)


def _without(sums: Tensor, home: Tensor, target: Tensor) -> Tensor:
    """(n,) sums of the target's tile without the target."""
    return sums.gather(1, home).squeeze(1) - target
