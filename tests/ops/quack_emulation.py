"""What the launches of `deft_plugin.ops.quack_kernels` leave in memory, computed on a CPU in their place.

Rounded where they round: exponentials, their products with strips, and hidden states to bfloat16; sums, maxima and the
target's logit in float32. What a launch would not take is an assertion here, and what it does not write is NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deft_plugin.ops.quack_sums import STRIP_COLUMNS, Partials
from deft_plugin.ops.sums import StatisticsRequest

HAS_STRIPS = True
LOG2_E = torch.tensor(math.log2(math.e), dtype=torch.float32).item()


def takes_strips(device: torch.device) -> bool:
    return HAS_STRIPS


def exponentials(
    powers: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    width: int,
    request: StatisticsRequest,
) -> Partials:
    _check_operands(hidden, weight)
    count, vocab_size = hidden.size(0), weight.size(0)
    assert hidden.size(1) % 8 == 0
    assert vocab_size % width == 0
    assert width % STRIP_COLUMNS == 0
    assert targets.shape == (count,)
    logits = hidden.float() @ weight.float().T
    blocks = logits.unflatten(1, (-1, width))
    maxima = blocks.amax(2)
    exponents = (maxima * LOG2_E).round()
    # One multiply-add, rounded once.
    difference = (blocks.double() * LOG2_E - exponents.double().unsqueeze(2)).float()
    power = difference.exp2()
    if powers is not None:
        assert powers.shape == logits.shape
        assert powers.dtype == torch.bfloat16
        powers.copy_(power.flatten(1))
    inside = (targets >= 0) & (targets < vocab_size)
    target_logit = logits.gather(1, targets.clamp(0, vocab_size - 1).unsqueeze(1)).squeeze(1)
    return Partials(
        exponents=exponents,
        maxima=maxima,
        powers=power.sum(2),
        squares=power.square().sum(2) if request.collision else None,
        weighted=(power * difference).sum(2) if request.entropy else None,
        target_logit=torch.where(inside, target_logit, torch.nan),
    )


def project_back_(gradient: Tensor, powers: Tensor, strips: Tensor, weight: Tensor) -> None:
    _check_operands(gradient, weight)
    gradient.copy_(_scaled(powers, strips) @ weight.float())


def add_outer_(gradient: Tensor, keep: int, powers: Tensor, strips: Tensor, hidden: Tensor) -> None:
    _check_operands(hidden)
    assert gradient.is_contiguous()
    assert gradient.dtype == torch.float32 or not keep
    product = _scaled(powers, strips).T @ hidden.float()
    gradient.copy_(gradient + product if keep else product)


def _scaled(powers: Tensor, strips: Tensor) -> Tensor:
    """(n, V) operand as the tensor cores get it, in float32."""
    count, vocab_size = powers.shape
    assert count % 128 == 0
    assert vocab_size % 128 == 0
    assert strips.shape == (vocab_size // STRIP_COLUMNS, count)
    assert strips.is_contiguous()
    assert powers.dtype == strips.dtype == torch.bfloat16
    return (powers * strips.T.repeat_interleave(STRIP_COLUMNS, dim=1)).float()


def _check_operands(*operands: Tensor) -> None:
    for operand in operands:
        assert operand.dtype == torch.bfloat16
        assert operand.is_contiguous()
        assert operand.numel()
