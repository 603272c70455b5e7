"""One Triton kernel that folds a tile of logits: sums for the statistics, and the error in its place.

One program a row, two walks over it, with every logit as a power of two: l_v = log2(e) z_v.

    forwards     m >= l_v, the largest; over the others than the target, the sums of e_v, e_v^2 and
                 e_v (l_v - m), where e_v = 2^(l_v - m)
    backwards    l_v  ->  e_v / D                        the row's end is still in the cache
    at last      l_y  ->  -(sum of the others' e_v) / D

That is the error p - e_y up to the row's factor D / S, which the caller applies to the product's rows: no pass over
the tile is spent on it. D = max(1, S / 256) keeps the target's entry in the range of float16.

What the loops leave out is what makes them fast. The target takes no part in the sums because its logit is -inf to
them, and in the second walk it is an ordinary column until it is overwritten: no comparison an element. Every thread
keeps a maximum of its own for each vector of columns that it loads: no exchange between threads, and no barrier,
before the row's end. Rows are read and written in vectors of 128 bits whatever the vocabulary's size, because the
buffer's rows are padded.

Runs on CUDA, ROCm and XPU, and on a CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .projection import LARGEST_SIMPLE_SOFTCAP, LogitsTransform
from .sums import StatisticsRequest

LOG2_E = tl.constexpr(math.log2(math.e))
LARGEST_SIMPLE_FACTOR = tl.constexpr(LARGEST_SIMPLE_SOFTCAP * math.log2(math.e))
# Columns at a time, by what was fastest on a H100. Few large programs, so that the rows in flight fit a cache of tens
# of MiB between the two walks; as many columns as a thread's registers hold, where rows are long enough to gain by it.
LONG_ROW = 98_304
LONG_ROW_BLOCK = 32_768
WRITING_BLOCK = 16_384
SHORT_BLOCK = 8_192
DOUBLE_BLOCK = 4_096
ELEMENTS_PER_WARP = 512
VECTOR_BYTES = 16
# Rows that begin at a multiple of this many elements are aligned for vectors and for matrix products.
ROW_ALIGNMENT = 64


@triton.jit
def _transformed(
    raw,
    bias,
    FACTOR: tl.constexpr,
    INNER_FACTOR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """z such that the logit in base 2 is FACTOR * z, FACTOR > 0, and the softcap's derivative."""
    z = raw.to(DTYPE)
    if HAS_BIAS:
        z += bias.to(DTYPE)
    derivative = 1.0
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + e^2x), with derivative 4 e^2x / (1 + e^2x)^2; the power may not overflow.
        LIMIT: tl.constexpr = 1022.0 if DTYPE is tl.float64 else 126.0
        exponent = tl.minimum(z * INNER_FACTOR, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        power = tl.exp2(exponent)
        share = 1.0 / (1.0 + power)
        derivative = 4.0 * share * (share * power)
        if FACTOR > LARGEST_SIMPLE_FACTOR and DTYPE is not tl.float64:
            # Where the difference below would be off by the softcap's 1e-7, tanh's series is off by less.
            x = z * (INNER_FACTOR / (2.0 * LOG2_E))
            square = x * x
            series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0)))
            z = tl.where(square < 1e-3, series, 1.0 - 2.0 * share)
        else:
            z = 1.0 - 2.0 * share
    elif INNER_FACTOR != 1.0:
        z *= INNER_FACTOR
    return z, derivative


@triton.jit(
    do_not_specialize=["sums_stride"],
    do_not_specialize_on_alignment=["targets_pointer", "sums_pointer"],
)
def _fold_kernel(
    logits_pointer,
    row_stride,
    targets_pointer,
    bias_pointer,
    sums_pointer,
    sums_stride,
    vocab_size,
    padded_size,
    FACTOR: tl.constexpr,
    INNER_FACTOR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COLLISION: tl.constexpr,
    ENTROPY: tl.constexpr,
    WRITE_ERROR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_pointer += row * row_stride
    sums_pointer += row
    target = tl.load(targets_pointer + row).to(tl.int32)
    columns = tl.arange(0, BLOCK)
    VECTORS: tl.constexpr = BLOCK // VECTOR

    target_bias = 0.0
    if HAS_BIAS:
        target_bias = tl.load(bias_pointer + target)
    target_z, target_derivative = _transformed(
        tl.load(logits_pointer + target),
        target_bias,
        FACTOR,
        INNER_FACTOR,
        HAS_SOFTCAP,
        DTYPE,
        HAS_BIAS,
    )

    # Finite from the start, so that no difference of maxima is inf - inf.
    maxima = tl.zeros((VECTORS,), DTYPE) + tl.maximum(target_z * FACTOR, -1e30)
    others = tl.zeros((VECTORS,), DTYPE)
    squares = tl.zeros((VECTORS,), DTYPE)
    weighted = tl.zeros((VECTORS,), DTYPE)
    for start in range(0, vocab_size, BLOCK):
        column = start + columns
        inside = column < padded_size
        raw = tl.load(logits_pointer + column, mask=inside, other=0.0, eviction_policy="evict_last")
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_pointer + column, mask=inside, other=0.0)
        z, _derivative = _transformed(raw, bias, FACTOR, INNER_FACTOR, HAS_SOFTCAP, DTYPE, HAS_BIAS)
        z = tl.where((column == target) | (column >= vocab_size), -float("inf"), z)
        z = tl.reshape(z, (VECTORS, VECTOR))
        new_maxima = tl.maximum(maxima, tl.max(z, 1) * FACTOR)
        difference = z * FACTOR - new_maxima[:, None]
        power = tl.exp2(difference)
        shift = maxima - new_maxima
        rescale = tl.exp2(shift)
        if ENTROPY:
            # A finite number in place of -inf, which times a power of 0 would be NaN.
            term = tl.maximum(difference, -1e4) * power
            weighted = (weighted + shift * others) * rescale + tl.sum(term, 1)
        if COLLISION:
            squares = squares * (rescale * rescale) + tl.sum(power * power, 1)
        others = others * rescale + tl.sum(power, 1)
        maxima = new_maxima

    maximum = tl.max(maxima, 0)
    shift = maxima - maximum
    rescale = tl.exp2(shift)
    sum_of_others = tl.sum(others * rescale, 0)
    offset = target_z * FACTOR - maximum
    total = sum_of_others + tl.exp2(offset)
    divisor = tl.maximum(1.0, total * (1.0 / 256.0))
    tl.store(sums_pointer, offset / LOG2_E)
    tl.store(sums_pointer + sums_stride, (target_z * FACTOR >= maximum).to(DTYPE))
    tl.store(sums_pointer + 2 * sums_stride, sum_of_others)
    if COLLISION:
        tl.store(sums_pointer + 3 * sums_stride, tl.sum(squares * (rescale * rescale), 0))
    if ENTROPY:
        weighted = (weighted + shift * others) * rescale
        tl.store(sums_pointer + 4 * sums_stride, tl.sum(weighted, 0) / LOG2_E)
    tl.store(sums_pointer + 5 * sums_stride, divisor / total)

    if WRITE_ERROR:
        base = maximum + tl.log2(divisor)
        blocks = tl.cdiv(vocab_size, BLOCK)
        for index in range(blocks):
            column = (blocks - 1 - index) * BLOCK + columns
            inside = column < padded_size
            raw = tl.load(
                logits_pointer + column, mask=inside, other=0.0, eviction_policy="evict_first"
            )
            bias = 0.0
            if HAS_BIAS:
                bias = tl.load(bias_pointer + column, mask=inside, other=0.0)
            z, derivative = _transformed(
                raw, bias, FACTOR, INNER_FACTOR, HAS_SOFTCAP, DTYPE, HAS_BIAS
            )
            error = tl.exp2(z * FACTOR - base) * derivative
            tl.store(
                logits_pointer + column, error.to(logits_pointer.dtype.element_ty), mask=inside
            )
        # Another thread has just written the target's column.
        tl.debug_barrier()
        error = -sum_of_others / divisor * target_derivative
        tl.store(logits_pointer + target, error.to(logits_pointer.dtype.element_ty))


def padded_vocab_size(vocab_size: int) -> int:
    """Elements from one row of the buffer to the next."""
    return triton.cdiv(vocab_size, ROW_ALIGNMENT) * ROW_ALIGNMENT


def triton_fold_(
    logits: Tensor,
    vocab_size: int,
    bias: Tensor | None,
    transform: LogitsTransform,
    targets: Tensor,
    request: StatisticsRequest,
    sums: Tensor,
    write_error: bool = True,
) -> None:
    """Overwrite raw logits with the error up to a factor per row, and fill in the rows' sums.

    Args:
        logits: (n, P), any floating dtype, before bias, scale and softcap; rows contiguous; destroyed. P is
            `padded_vocab_size(vocab_size)`; what the columns beyond vocab_size hold means nothing.
        vocab_size: V.
        bias: (P,), contiguous, or None.
        transform: what follows the projection.
        targets: (n,), int64, in [0, V).
        request: optional statistics to compute.
        sums: (6, n), rows contiguous; see `Sums`. Overwritten, but for those that were not requested.
        write_error: False leaves the logits as they are, for an evaluation.
    """
    if not logits.size(0):
        return
    with current_device(logits.device):
        _fold_kernel[(logits.size(0),)](
            logits,
            logits.stride(0),
            targets.contiguous(),
            bias,
            sums,
            sums.stride(0),
            vocab_size,
            logits.size(1),
            **launch_options(
                vocab_size, logits.dtype, bias is not None, transform, request, write_error
            ),
        )


def launch_options(
    vocab_size: int,
    dtype: torch.dtype,
    has_bias: bool,
    transform: LogitsTransform,
    request: StatisticsRequest,
    write_error: bool,
    rocm: bool = bool(torch.version.hip),
) -> dict[str, Any]:
    """The kernel's compile-time constants and its number of warps, of 32 threads or, on ROCm, 64."""
    if dtype == torch.float64:
        block = DOUBLE_BLOCK
    elif vocab_size < LONG_ROW or not write_error:
        block = SHORT_BLOCK
    elif rocm or has_bias or transform.softcap is not None or dtype.itemsize > 2:
        block = WRITING_BLOCK
    else:
        block = LONG_ROW_BLOCK
    block = min(block, max(triton.next_power_of_2(vocab_size), 128))
    # Four bytes and a softcap together are more than a thread's registers hold of as many columns.
    heavy = dtype == torch.float32 and transform.softcap is not None
    elements = ELEMENTS_PER_WARP // 2 if heavy else ELEMENTS_PER_WARP
    if transform.softcap is not None:
        factor = transform.softcap * LOG2_E.value
        inner_factor = 2 * LOG2_E.value * transform.scale / transform.softcap
    elif transform.scale > 0:
        factor, inner_factor = transform.scale * LOG2_E.value, 1.0
    else:
        # A maximum goes through a positive factor alone.
        factor, inner_factor = LOG2_E.value, transform.scale
    return {
        "FACTOR": factor,
        "INNER_FACTOR": inner_factor,
        "HAS_SOFTCAP": transform.softcap is not None,
        "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK": block,
        "VECTOR": VECTOR_BYTES // dtype.itemsize,
        "HAS_BIAS": has_bias,
        "COLLISION": request.collision,
        "ENTROPY": request.entropy,
        "WRITE_ERROR": write_error,
        "num_warps": max(4, min(16 if rocm else 32, block // elements)),
    }


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """`device` as the current one, which is where Triton launches whatever its arguments are on."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return context
