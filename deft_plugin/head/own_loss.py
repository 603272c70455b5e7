"""A model's own loss: cross-entropy on the next token, and a mixture's auxiliary loss, or refused."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from .auxiliary_loss import auxiliary_loss_of, coefficient_of
from .configuration import numbers_of
from .lm_head import lm_head_of, lm_head_rows, lm_head_width
from .measurement import UnknownForwardError


def check_loss_functions(model: PreTrainedModel, functions: list[Any], logits: Tensor) -> None:
    """Refuse a loss function that is not the next token's cross-entropy, on logits of ordinary size."""
    functions = [function for function in functions if function is not ForCausalLMLoss]
    if not functions:
        return
    vocab_size, layer = logits.size(-1), lm_head_of(model)
    generator = torch.Generator().manual_seed(2)
    ordinary = torch.randn(2, 16, vocab_size, generator=generator).to(logits.device)
    if lm_head_width(layer) != lm_head_rows(layer):
        # A loss of the ranks' logits together adds log 2 where all have the same: little beside large numbers.
        ordinary *= 4096
    labels = torch.randint(vocab_size, (2, 16), generator=generator)
    labels[-1, -6:] = -100
    # A weight of its own, if any token has one, is the end's.
    special = {int(n) for n in numbers_of(model) if float(n).is_integer() and 0 <= n < vocab_size}
    chosen = torch.tensor(sorted(special)[:15], dtype=torch.int64)
    labels[0, 1 : 1 + len(chosen)] = chosen
    for function in functions:
        own = function(logits=ordinary, labels=labels.to(logits.device), vocab_size=vocab_size)
        _check_same_loss(model, own, cross_entropy(ordinary, labels))


def check_same_logits(model: nn.Module, returned: Any, scored: Any) -> None:
    """Refuse a forward that returns other logits than it gives to its loss function."""
    if isinstance(returned, Tensor) and isinstance(scored, Tensor):
        same_shape = returned.shape == scored.shape
        if not same_shape or not torch.allclose(returned.float(), scored.float(), rtol=0.01):
            raise UnknownForwardError(
                model, "returns another logits than those that its loss is of"
            )


def check_loss(
    model: PreTrainedModel, loss: Any, counted: Tensor, output: Any, probe: Tensor
) -> None:
    """Refuse a forward whose loss is more than what is counted and a coefficient times its auxiliary loss.

    Args:
        model: whose forward it is.
        loss: the forward's.
        counted: what of it is known: the score's in the place of cross-entropy, or the cross-entropy of what became
            of the probe.
        output: the forward's.
        probe: the numbers in the place of logits; the two losses have the same gradient in them.
    """
    if isinstance(loss, Tensor) and loss.isnan() and counted.isnan():
        return  # Of a weight that is NaN, which trainers look for by name.
    auxiliary_coefficient(model, loss, counted, output)
    _check_same_gradient(model, loss, counted, probe)


def auxiliary_coefficient(
    model: PreTrainedModel, loss: Any, counted: Tensor, output: Any
) -> float | None:
    """The coefficient with which a loss () has the output's auxiliary loss beside what is counted; None without one.

    Raises:
        UnknownForwardError: the loss is something else.
    """
    aux_loss = auxiliary_loss_of(output)
    if aux_loss is None or not isinstance(loss, Tensor):
        _check_same_loss(model, loss, counted)
        return None
    return coefficient_of(model, loss, counted, aux_loss)


def drops_masked_labels(
    model: nn.Module, output: Any, labels: Tensor, mask: Tensor, coefficient: float | None
) -> bool:
    """Whether the output's loss is that of the labels (b, n) where `mask` is not 0, rather than that of all.

    Raises:
        UnknownForwardError: it is neither.
    """
    added = 0.0 if coefficient is None else coefficient * output.aux_loss
    losses = [
        cross_entropy(output.logits, counted) + added
        for counted in (labels, labels.masked_fill(mask == 0, -100))
    ]
    for dropped, loss in enumerate(losses):
        if _is_same_loss(output.loss, loss):
            return bool(dropped)
    raise UnknownForwardError(model, "has a loss that depends on attention_mask in an unknown way")


def _check_same_gradient(model: nn.Module, loss: Tensor, counted: Tensor, probe: Tensor) -> None:
    found, expected = _gradient(loss, probe), _gradient(counted, probe)
    if not (found - expected).norm() <= 0.02 * expected.norm():
        raise UnknownForwardError(
            model,
            "has a loss whose gradient in its logits is not that of cross-entropy on the next token",
        )


def _gradient(loss: Tensor, probe: Tensor) -> Tensor:
    """Of a loss in the probe; 0 where it has none."""
    gradient = None
    if loss.requires_grad and probe.requires_grad:
        (gradient,) = torch.autograd.grad(loss, probe, retain_graph=True, allow_unused=True)
    return torch.zeros_like(probe) if gradient is None else gradient


def _is_same_loss(own: Any, expected: Tensor) -> bool:
    """Whether a loss () is the expected one but for rounding."""
    found = own.float().item() if isinstance(own, Tensor) else math.nan
    return abs(found - expected.item()) <= 5e-4 * max(abs(expected.item()), 1e-6)


def _check_same_loss(model: nn.Module, own: Any, expected: Tensor) -> None:
    if not _is_same_loss(own, expected):
        found = own.float().item() if isinstance(own, Tensor) else math.nan
        raise UnknownForwardError(
            model,
            f"gives another loss than cross-entropy on the next token: {found:.6g} for {expected.item():.6g}",
        )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """What a causal LM's loss is: of (b, n, V) and (b, n)."""
    targets = labels[:, 1:].flatten().to(logits.device)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets)
