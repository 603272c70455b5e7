"""One Triton kernel between QuACK's products: from the sums of each block of a row to the row's, and the error's target entry.

The epilogue knows nothing of targets: its sums are over all columns, each block's relative to a power of two of its own.
Here the blocks of a row meet in one reference, and the target leaves its own, the home block:

    rest = sum of the home block - e_y             where that cancels no more than 12 bits
         = sum of the stored e_v, v != y           where the target is nearly all of the block

The second is rounded to bfloat16 and off by 2^-9 at most, of something that is at most 2^-12 of the block: 1 - p_y is as near
to the truth as float32 logits have it, and within 2^-9 of itself however near to 0 it is. Without stored exponentials,
in an evaluation, the difference is all there is.

The stored exponentials are the error but for the target's entry, minus the others' sum in the home block's reference.
A home block so far below the row's largest exponent that this would leave bfloat16's range is brought nearer first.

Runs on a GPU, and on a CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sums import StatisticsRequest
from .triton_fold import current_device

# log2(e) in float32, as QuACK's kernel has it.
LOG2_E = tl.constexpr(torch.tensor(math.log2(math.e), dtype=torch.float32).item())
# Share of the home block's sum below which what is left of it is summed anew.
SMALLEST_DIFFERENCE = tl.constexpr(2.0**-12)
# How far below the row's largest exponent a home block's may be, in powers of two.
FARTHEST = tl.constexpr(64.0)
# Columns that have one scale in QuACK's products of the gradients.
STRIP_COLUMNS = 64
BLOCKS_PER_WARP = 256


class Partials(NamedTuple):
    """What is known of each block of each row, in float32; B blocks a row.

    With z a logit, k the block's exponent, e = 2^(log2(e) z - k):

    Args:
        exponents: (n, B), the integers k.
        maxima: (n, B), largest z.
        powers: (n, B), sums of e.
        squares: (n, B), sums of e^2; None unless requested.
        weighted: (n, B), sums of e log2(e); None unless requested.
        target_logit: (n,), z of the target.
    """

    exponents: Tensor
    maxima: Tensor
    powers: Tensor
    squares: Tensor | None
    weighted: Tensor | None
    target_logit: Tensor


@triton.jit
def _without(total, target, stored, cancels, STORED: tl.constexpr):
    """The home block's sum without the target."""
    rest = total - target
    if STORED:
        rest = tl.where(cancels, tl.sum(stored, 0), rest)
    return rest


@triton.jit(
    do_not_specialize=["sums_stride"],
    do_not_specialize_on_alignment=["targets_pointer", "sums_pointer"],
)
def _row_kernel(
    exponents_pointer,
    maxima_pointer,
    powers_pointer,
    squares_pointer,
    weighted_pointer,
    target_logit_pointer,
    targets_pointer,
    stored_pointer,
    stored_stride,
    sums_pointer,
    sums_stride,
    block_count,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLLISION: tl.constexpr,
    ENTROPY: tl.constexpr,
    STORED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_pointer + row).to(tl.int32)
    home = target // WIDTH
    first = row * block_count
    block = tl.arange(0, BLOCKS)
    inside = block < block_count
    exponent = tl.load(exponents_pointer + first + block, mask=inside, other=-float("inf"))
    largest = tl.max(exponent, 0)
    maximum = tl.max(tl.load(maxima_pointer + first + block, mask=inside, other=-float("inf")), 0)
    reference = maximum * LOG2_E
    shift = tl.where(inside, exponent - reference, 0.0)
    scale = tl.where(inside, tl.exp2(shift), 0.0)

    # In float64, since the product's multiply-add rounds once where two operations here would round twice.
    target_logit = tl.load(target_logit_pointer + row)
    home_exponent = tl.load(exponents_pointer + first + home)
    difference = (target_logit.to(tl.float64) * LOG2_E - home_exponent.to(tl.float64)).to(
        tl.float32
    )
    power = tl.exp2(difference)

    column = tl.arange(0, COLUMNS)
    is_target = column == target % WIDTH
    stored = tl.zeros((COLUMNS,), tl.float32)
    if STORED:
        home_pointer = stored_pointer + row * stored_stride + home * WIDTH + column
        stored = tl.load(home_pointer, mask=column < WIDTH, other=0.0).to(tl.float32)
        stored = tl.where(is_target, 0.0, stored)

    total = tl.load(powers_pointer + first + home)
    cancels = total - power < total * SMALLEST_DIFFERENCE
    rest = _without(total, power, stored, cancels, STORED)
    # Rounding may leave less than nothing. Not by `maximum`, which loses NaN.
    rest = tl.where(rest < 0, 0.0, rest)
    powers = tl.load(powers_pointer + first + block, mask=inside, other=0.0)
    powers = tl.where(block == home, rest, powers)
    others = tl.sum(powers * scale, 0)
    offset = target_logit - maximum
    tl.store(sums_pointer + row, offset)
    tl.store(sums_pointer + row + sums_stride, (target_logit >= maximum).to(tl.float32))
    tl.store(sums_pointer + row + 2 * sums_stride, others)
    if COLLISION:
        total = tl.load(squares_pointer + first + home)
        rest = _without(total, power * power, stored * stored, cancels, STORED)
        squares = tl.load(squares_pointer + first + block, mask=inside, other=0.0)
        squares = tl.where(block == home, rest, squares)
        tl.store(sums_pointer + row + 3 * sums_stride, tl.sum(squares * (scale * scale), 0))
    if ENTROPY:
        # Finite numbers in place of -inf, which times a power of 0 would be NaN.
        terms = stored * tl.log2(tl.maximum(stored, 1e-38))
        term = power * tl.maximum(difference, -1e4)
        total = tl.load(weighted_pointer + first + home)
        rest = _without(total, term, terms, cancels, STORED)
        weighted = tl.load(weighted_pointer + first + block, mask=inside, other=0.0)
        weighted = tl.where(block == home, rest, weighted)
        weighted = tl.sum((weighted + powers * shift) * scale, 0)
        tl.store(sums_pointer + row + 4 * sums_stride, weighted / LOG2_E)
    row_factor = tl.exp2(largest - reference) / (others + tl.exp2(offset * LOG2_E))
    tl.store(sums_pointer + row + 5 * sums_stride, row_factor)

    if STORED:
        nearer = tl.maximum(home_exponent, largest - FARTHEST)
        error = tl.where(
            is_target,
            -others * tl.exp2(reference - nearer),
            stored * tl.exp2(home_exponent - nearer),
        )
        tl.store(home_pointer, error.to(stored_pointer.dtype.element_ty), mask=column < WIDTH)
        # Another thread may still want the exponent.
        tl.debug_barrier()
        tl.store(exponents_pointer + first + home, nearer)


def sums_and_error_(
    sums: Tensor,
    partials: Partials,
    targets: Tensor,
    width: int,
    request: StatisticsRequest,
    powers: Tensor | None,
) -> None:
    """Fill in the rows' sums, and make the stored exponentials the error, each block relative to its exponent.

    Args:
        sums: (6, n), rows contiguous, see `Sums`; `row_factor` is for the error relative to the row's largest exponent.
        partials: of at least n rows, contiguous. `exponents` change with the blocks that are brought nearer.
        targets: (n,), int64, in [0, V).
        width: of a block, in columns.
        request: which sums there are.
        powers: at least n rows of V, bfloat16; the exponentials as the product left them. None where none are stored.
    """
    block_count = partials.exponents.size(1)
    with current_device(sums.device):
        _row_kernel[(targets.numel(),)](
            *partials,
            targets.contiguous(),
            powers,
            0 if powers is None else powers.stride(0),
            sums,
            sums.stride(0),
            block_count,
            **launch_options(block_count, width, request, powers is not None),
        )


def launch_options(
    block_count: int, width: int, request: StatisticsRequest, stored: bool
) -> dict[str, Any]:
    """The kernel's compile-time constants and its number of warps."""
    blocks = triton.next_power_of_2(block_count)
    return {
        "WIDTH": width,
        "COLUMNS": triton.next_power_of_2(width),
        "BLOCKS": blocks,
        "COLLISION": request.collision,
        "ENTROPY": request.entropy,
        "STORED": stored,
        "num_warps": min(max(blocks // BLOCKS_PER_WARP, 1), 8),
    }


def block_scales(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, B) powers of two that bring each block to the row's largest exponent; exact in any floating dtype."""
    return (exponents - exponents.amax(1, keepdim=True)).exp2().to(dtype)
