"""One Triton kernel that folds a tile of logits: sums for the statistics, and the error in its place.

One program a row, two passes over it. The first keeps a running maximum m and, relative to it, running sums over
the vocabulary; the second, while the row is still in the cache, overwrites logit z_v with e^(z_v-m) / D and the
target's with -(sum of the others) / D. That is the error p - e_y up to the row's factor D / S, which the caller
applies to the product's rows: no pass over the tile is spent on it. D = max(1, S / 256) keeps the target's entry
in the range of float16.

Runs on CUDA, ROCm and XPU, and on a CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..objectives import TokenStatistics
from .projection import LogitsTransform
from .softmax import StatisticsRequest, statistics_dtype, top_k_entropy

LARGEST_BLOCK = 16384
# Few large programs at a time: then the rows in flight fit a cache of tens of MiB between the two passes.
ELEMENTS_PER_WARP = 512


@triton.jit
def _logit(
    raw,
    bias,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The logit softcap(scale * (raw + bias)) and the softcap's derivative."""
    logit = raw.to(DTYPE)
    if HAS_BIAS:
        logit += bias.to(DTYPE)
    logit *= SCALE
    derivative = 1.0
    if SOFTCAP is not None:
        ratio = logit / SOFTCAP
        # tanh by a power that cannot overflow; its derivative without the cancellation of 1 - tanh^2.
        power = tl.exp(-2.0 * tl.abs(ratio))
        magnitude = (1.0 - power) / (1.0 + power)
        saturation = tl.where(ratio < 0, -magnitude, magnitude)
        logit = SOFTCAP * saturation
        derivative = 4.0 * power / ((1.0 + power) * (1.0 + power))
    return logit, derivative


@triton.jit
def _fold_kernel(
    logits_pointer,
    row_stride,
    targets_pointer,
    bias_pointer,
    sums_pointer,
    sums_stride,
    vocab_size,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COLLISION: tl.constexpr,
    ENTROPY: tl.constexpr,
    WRITE_ERROR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_pointer += row * row_stride
    sums_pointer += row
    target = tl.load(targets_pointer + row)
    columns = tl.arange(0, BLOCK)

    target_bias = 0.0
    if HAS_BIAS:
        target_bias = tl.load(bias_pointer + target)
    target_logit, _ = _logit(
        tl.load(logits_pointer + target), target_bias, SCALE, SOFTCAP, DTYPE, HAS_BIAS
    )

    # Sums are kept for each lane and added up once, at the end. `others` leaves the target out, so that
    # 1 - p of a confident token is a sum of small numbers and not the difference of large ones.
    maximum = target_logit
    others = tl.zeros((BLOCK,), DTYPE)
    squares = tl.zeros((BLOCK,), DTYPE)
    weighted = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, vocab_size, BLOCK):
        column = start + columns
        inside = column < vocab_size
        raw = tl.load(
            logits_pointer + column, mask=inside, other=-float("inf"), eviction_policy="evict_last"
        )
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_pointer + column, mask=inside, other=0.0)
        logit, _ = _logit(raw, bias, SCALE, SOFTCAP, DTYPE, HAS_BIAS)
        # After the transform: a softcap or a negative scale would make padding finite, or +inf.
        logit = tl.where(inside, logit, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(logit, 0))
        # While nothing but -inf was seen, any finite number will do in place of the maximum.
        base = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        shift = tl.where(maximum == -float("inf"), 0.0, maximum - base)
        rescale = tl.exp(shift)
        difference = logit - base
        power = tl.exp(difference)
        if ENTROPY:
            term = tl.where(power == 0, 0.0, difference * power)
            weighted = (weighted + shift * others) * rescale + tl.where(column == target, 0.0, term)
        if COLLISION:
            squares = squares * (rescale * rescale) + power * power
        others = others * rescale + tl.where(column == target, 0.0, power)
        maximum = new_maximum

    base = tl.where(maximum == -float("inf"), 0.0, maximum)
    sum_of_others = tl.sum(others, 0)
    tl.store(sums_pointer, target_logit)
    tl.store(sums_pointer + sums_stride, maximum)
    tl.store(sums_pointer + 2 * sums_stride, sum_of_others)
    if COLLISION:
        tl.store(sums_pointer + 3 * sums_stride, tl.sum(squares, 0))
    if ENTROPY:
        tl.store(sums_pointer + 4 * sums_stride, tl.sum(weighted, 0))

    if WRITE_ERROR:
        inverse_divisor = 1.0 / tl.maximum(
            1.0, (sum_of_others + tl.exp(target_logit - base)) * (1.0 / 256.0)
        )
        for start in range(0, vocab_size, BLOCK):
            column = start + columns
            inside = column < vocab_size
            raw = tl.load(
                logits_pointer + column, mask=inside, other=0.0, eviction_policy="evict_first"
            )
            bias = 0.0
            if HAS_BIAS:
                bias = tl.load(bias_pointer + column, mask=inside, other=0.0)
            logit, derivative = _logit(raw, bias, SCALE, SOFTCAP, DTYPE, HAS_BIAS)
            error = tl.where(column == target, -sum_of_others, tl.exp(logit - base))
            error = error * inverse_divisor * derivative
            tl.store(
                logits_pointer + column, error.to(logits_pointer.dtype.element_ty), mask=inside
            )


def triton_fold_(
    logits: Tensor,
    bias: Tensor | None,
    transform: LogitsTransform,
    targets: Tensor,
    request: StatisticsRequest,
    write_error: bool,
) -> tuple[Tensor, Tensor, TokenStatistics]:
    """Overwrite raw logits with the error up to a factor per row.

    Args:
        logits: (n, V), any floating dtype, before bias, scale and softcap; rows contiguous; destroyed.
        bias: (V,) or None.
        transform: what follows the projection.
        targets: (n,), int64, in [0, V).
        request: optional statistics to compute.
        write_error: False leaves the logits as they are, for an evaluation.

    Returns:
        The error (n, V), with the softcap's derivative in it; the factor (n,) of its rows; the statistics.
        A row with NaN or +inf, or with nothing but -inf, has NaN statistics.
    """
    count, vocab_size = logits.shape
    # The kernel takes both for vectors of stride 1.
    targets, bias = targets.contiguous(), None if bias is None else bias.contiguous()
    dtype = statistics_dtype(logits.dtype)
    sums = torch.empty(5, count, dtype=dtype, device=logits.device)
    top_k = None
    if request.top_k is not None:
        top_k = top_k_entropy(_transformed(logits, bias, transform), request.top_k)
    if count:
        block = min(LARGEST_BLOCK, triton.next_power_of_2(vocab_size))
        _fold_kernel[(count,)](
            logits,
            logits.stride(0),
            targets,
            bias,
            sums,
            sums.stride(0),
            vocab_size,
            SCALE=transform.scale,
            SOFTCAP=transform.softcap,
            DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
            BLOCK=block,
            HAS_BIAS=bias is not None,
            COLLISION=request.collision,
            ENTROPY=request.entropy,
            WRITE_ERROR=write_error,
            num_warps=max(4, min(_most_warps(), block // ELEMENTS_PER_WARP)),
        )
    target_logit, maximum, others, squares, weighted = sums
    offset = target_logit - maximum
    power = offset.exp()
    total = others + power
    missed = others / total
    log_p = torch.where(missed < 0.5, torch.log1p(-missed), offset - total.log())
    statistics = TokenStatistics(
        log_p=log_p,
        vocab_size=vocab_size,
        is_top1=target_logit >= maximum,
        collision=squares / total.square() if request.collision else None,
        entropy=_entropy(total, weighted, offset, power) if request.entropy else None,
        top_k_entropy=top_k,
    )
    return logits, (total / 256).clamp(min=1) / total, statistics


def _entropy(total: Tensor, weighted: Tensor, offset: Tensor, power: Tensor) -> Tensor:
    target_term = torch.where(power == 0, torch.zeros_like(power), offset * power)
    # Rounding may leave -1e-8 of the entropy of a token with p = 1.
    return (total.log() - (weighted + target_term) / total).clamp(min=0)


def _transformed(logits: Tensor, bias: Tensor | None, transform: LogitsTransform) -> Tensor:
    logits = logits if bias is None else logits + bias
    return transform(logits.to(statistics_dtype(logits.dtype)))


def _most_warps() -> int:
    """1024 threads: 32 warps, or 16 wavefronts of 64 on ROCm."""
    return 16 if torch.version.hip else 32
