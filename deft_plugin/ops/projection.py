"""The map from hidden states to logits.

z = softcap(logit_scale * (hidden @ weight.T + low_rank_hidden @ low_rank_weight.T + bias))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Up to which tanh is taken of one exponential: it is off by 1e-7 then, and a logit by that times the softcap.
LARGEST_SIMPLE_SOFTCAP = 100.0
SMALLEST_FACTOR = 1e-30


class Operands(NamedTuple):
    """The tensors that logits are made of, of any floating dtypes; each may require a gradient.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        low_rank_hidden: (N, r) or None.
        low_rank_weight: (V, r), or None with it.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    low_rank_hidden: Tensor | None = None
    low_rank_weight: Tensor | None = None

    def products(self) -> list[tuple[Tensor, Tensor]]:
        """(N, k) and (V, k) of each product that the logits are the sum of: one, or two with a low rank."""
        products = [(self.hidden, self.weight)]
        if self.low_rank_hidden is not None and self.low_rank_weight is not None:
            products.append((self.low_rank_hidden, self.low_rank_weight))
        return products

    def with_weights_in(self, dtype: torch.dtype) -> Operands:
        """The same with weights in the products' dtype."""
        low_rank_weight = None if self.low_rank_weight is None else self.low_rank_weight.to(dtype)
        return self._replace(weight=self.weight.to(dtype), low_rank_weight=low_rank_weight)


@dataclass(frozen=True)
class LogitsTransform:
    """What a model does to its logits after the projection.

    Args:
        scale: factor on the logits (Cohere's `logit_scale`, the inverse of Granite's
            `logits_scaling`); finite.
        softcap: c in c * tanh(z / c) (Gemma 2's `final_logit_softcapping`), > 0; None for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        # Smaller ones are nothing in float32.
        if not math.isfinite(self.scale) or 0 < abs(self.scale) < SMALLEST_FACTOR:
            raise ValueError(
                f"logit_scale is {self.scale!r}; it must be a finite number, 0 or at least {SMALLEST_FACTOR} in size."
            )
        if self.softcap is not None and not SMALLEST_FACTOR <= self.softcap < math.inf:
            raise ValueError(
                f"softcap is {self.softcap!r}; it must be a number > 0, or None. The smallest is {SMALLEST_FACTOR}."
            )

    def __call__(self, logits: Tensor) -> Tensor:
        """Transformed logits, out of place and differentiable."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def apply_(self, logits: Tensor) -> Tensor | None:
        """Transform `logits` in place; return the softcap's derivative, or None where it is 1."""
        if self.softcap is None:
            if self.scale != 1.0:
                logits.mul_(self.scale)
            return None
        if self.softcap > LARGEST_SIMPLE_SOFTCAP:
            logits.mul_(self.scale / self.softcap)
            derivative = logits.cosh().square_().reciprocal_()
            logits.tanh_().mul_(self.softcap)
            return derivative
        # tanh(x) = 1 - 2 / (1 + e^2x), with derivative 4 e^2x / (1 + e^2x)^2: one exponential, where a CPU's tanh and
        # cosh take several times as long. The power may not overflow, and its square is never formed.
        most = math.log(torch.finfo(logits.dtype).max) - 2
        power = logits.mul_(2 * self.scale / self.softcap).clamp_(max=most).exp_()
        share = (power + 1).reciprocal_()
        derivative = (power * share).mul_(share).mul_(4)
        torch.mul(share, -2 * self.softcap, out=logits).add_(self.softcap)
        return derivative


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype `torch.nn.functional.linear` would multiply in, mixed dtypes being promoted.

    A low-rank product follows: an adapter in float32 does not make a float32 copy of a bfloat16 weight.
    """
    device_type = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    # Autocast leaves float64 alone.
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return dtype


def project(operands: Operands, rows: Tensor | None, transform: LogitsTransform) -> Tensor:
    """Full logits (n, V) in float32 or float64, differentiable.

    Args:
        rows: (n,) int64 rows of the hidden states; None for all of them.
    """
    dtype = product_dtype(operands.hidden, operands.weight)
    bias = None if operands.bias is None else operands.bias.to(dtype)
    (hidden, weight), *low_rank = [
        ((hidden if rows is None else hidden[rows]).to(dtype), weight.to(dtype))
        for hidden, weight in operands.products()
    ]
    logits = functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    for hidden, weight in low_rank:
        logits = logits + functional.linear(hidden, weight)
    return transform(logits)
