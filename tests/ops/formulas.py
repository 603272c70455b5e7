"""The definitions that the core must agree with: objectives written out on full logits, in float64.

Nothing here is shared with the package: p is a softmax, everything but log p_y is detached, gradients
are PyTorch's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def formula_losses(logits: Tensor, targets: Tensor, name: str, **parameters: Any) -> Tensor:
    """Per-token losses (n,) of logits (n, V) and targets (n,), differentiable in the logits."""
    log_p = logits.log_softmax(1)[torch.arange(len(targets)), targets]
    p_all = logits.detach().softmax(1)
    p = log_p.detach().exp()
    cayley = p / (2 - p)
    match name:
        case "nll":
            return -log_p
        case "p":
            return 1 - log_p.exp()
        case "dft":
            return -p * log_p
        case "eaft":
            return -_entropy_weight(p_all, **parameters) * log_p
        case "alpha":
            return _deformed(log_p, torch.full_like(p, parameters.get("a", 0.5)))
        case "cayley":
            return _deformed(log_p, cayley)
        case "cayley_trans":
            mean = parameters.get("mean_probability", p.mean())
            floor = parameters.get("floor_coefficient", 0.5) * mean
            focus = floor + (1 - floor) * cayley
            return _deformed(log_p, focus.clamp(parameters.get("minimum", 0.001), 1))
        case "deft":
            return _deformed(log_p, (p_all**2).sum(1))
    raise ValueError(name)


def shannon_entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last dimension."""
    return torch.special.entr(probabilities).sum(-1)


def _deformed(log_p: Tensor, focus: Tensor) -> Tensor:
    """(1 - p^a) / a, or -log p where a is 0."""
    exponent = focus * log_p
    # The plain difference has no digits where a is tiny, and the gradient of expm1 none where p^a is.
    difference = torch.where(exponent > -0.5, -torch.expm1(exponent), 1 - exponent.exp())
    safe_focus = torch.where(focus == 0, 1, focus)
    return torch.where(focus == 0, -log_p, difference / safe_focus)


def _entropy_weight(
    p_all: Tensor,
    entropy: str = "top_k",
    k: int = 20,
    normalizer: float = 3.0,
    exponent: float = 1.0,
) -> Tensor:
    if entropy == "full":
        return (shannon_entropy(p_all) / math.log(p_all.size(1))) ** exponent
    largest = p_all.sort(1, descending=True).values[:, :k]
    largest = largest / largest.sum(1, keepdim=True)
    return (shannon_entropy(largest) / normalizer) ** exponent
