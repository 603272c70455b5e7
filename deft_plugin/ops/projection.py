"""The map from hidden states to logits: z = softcap(logit_scale * (hidden @ weight.T + bias))."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


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
        if not math.isfinite(self.scale):
            raise ValueError(f"logit_scale is {self.scale!r}; it must be a finite number.")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap is {self.softcap!r}; it must be a number > 0, or None.")

    def __call__(self, logits: Tensor) -> Tensor:
        """Transformed logits, out of place and differentiable."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def apply_(self, logits: Tensor) -> Tensor | None:
        """Transform `logits` in place; return the softcap's derivative, or None where it is 1."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is None:
            return None
        logits.div_(self.softcap)
        # 1 / cosh^2 where 1 - tanh^2 would cancel to 0.
        derivative = logits.cosh().square_().reciprocal_()
        logits.tanh_().mul_(self.softcap)
        return derivative


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype `torch.nn.functional.linear` would multiply in, mixed dtypes being promoted."""
    device_type = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    # Autocast leaves float64 alone.
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return dtype


def project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitsTransform
) -> Tensor:
    """Full logits (N, V) in float32 or float64, differentiable. Shapes as in `linear_gated_loss`."""
    dtype = product_dtype(hidden, weight)
    bias = None if bias is None else bias.to(dtype)
    logits = functional.linear(hidden.to(dtype), weight.to(dtype), bias)
    return transform(logits if logits.dtype == torch.float64 else logits.float())
