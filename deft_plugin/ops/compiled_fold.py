"""The fold of a tile on a CPU, compiled by torch.compile: two walks over a row in place of ten over a tile.

The same sums and the same error as `softmax.fold_`, in one C++ loop for the maximum and one for all sums, so that
the entropy and a softcap cost next to nothing. It needs a C++ compiler, and some ten seconds the first time that it
meets a combination of settings; PyTorch keeps what it compiled on disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .projection import LogitsTransform
from .sums import StatisticsRequest, Sums


def compiled_fold_(
    logits: Tensor,
    bias: Tensor | None,
    transform: LogitsTransform,
    targets: Tensor,
    request: StatisticsRequest,
    sums: Tensor,
    limit_error: bool = False,
) -> None:
    """Overwrite raw logits with the error p - e_y up to a factor per row, and fill in the rows' sums.

    Args:
        logits, bias, transform, targets, request, sums, limit_error: as in `softmax.fold_`; on a CPU.
    """
    if not logits.size(0):
        return
    compiled = _compiled(transform, request.collision, request.entropy, limit_error)
    compiled(logits, bias, targets.unsqueeze(1), sums)


@functools.cache
def _compiled(
    transform: LogitsTransform, collision: bool, entropy: bool, limit_error: bool
) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], None]:
    """A function of logits (n, V), bias (V,), targets (n, 1) and sums (6, n), for settings that do not change."""

    def fold(logits: Tensor, bias: Tensor | None, targets: Tensor, sums: Tensor) -> None:
        z = logits if bias is None else logits + bias
        if transform.scale != 1.0:
            z = z * transform.scale
        derivative = None
        if transform.softcap is not None:
            # tanh(x) = 1 - 2 / (1 + e^2x), with derivative 4 e^2x / (1 + e^2x)^2; the power may not overflow.
            power = (z * (2 / transform.softcap)).clamp(max=80).exp()
            share = 1 / (1 + power)
            derivative = 4 * share * (share * power)
            z = transform.softcap * (1 - 2 * share)
        is_target = torch.arange(z.size(1), device=z.device).unsqueeze(0) == targets
        target_logit = z.gather(1, targets)
        largest = z.amax(1, keepdim=True)
        offset = target_logit - largest
        difference = z - largest
        power = torch.where(is_target, 0.0, difference.exp())
        others = power.sum(1, keepdim=True, dtype=torch.float64).to(power.dtype)
        row_factor = 1 / (others + offset.exp())
        sums[0] = offset.squeeze(1)
        sums[1] = (target_logit >= largest).squeeze(1)
        sums[2] = others.squeeze(1)
        if collision:
            sums[3] = power.square().sum(1, dtype=torch.float64)
        if entropy:
            # A finite number in place of -inf, which times a power of 0 would be NaN.
            sums[4] = (difference.clamp(min=-1e4) * power).sum(1, dtype=torch.float64)
        error = torch.where(is_target, -others, power)
        if derivative is not None:
            error = error * derivative
        if limit_error:
            error = error * row_factor
            row_factor = torch.ones_like(row_factor)
        sums[5] = row_factor.squeeze(1)
        logits.copy_(error)

    return torch.compile(fold, dynamic=True)
