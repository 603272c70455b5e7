"""What a model's own forward does to its lm_head's logits, found out with known numbers in their place.

The numbers lie over 25 powers of two: what has become of them says scale, softcap and how many columns are left, and
the graph of what is made of them whether parameters come in. What is nothing of the kind is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..ops.projection import LogitsTransform
from .configuration import configs_of
from .lm_head import innermost

# Of the probe, and of the batch that a forward is tried on: two rows, since a loss may be a mean of means.
PROBE_SHAPE = (2, 4)
_SMALLEST_POWER, _LARGEST_POWER = -10, 15


class UnknownForwardError(ValueError):
    """A model's forward treats its logits or labels in a way that the gated head does not know."""

    def __init__(self, model: nn.Module, what: str) -> None:
        super().__init__(
            f"{type(model).__name__}'s own forward {what}. Use deft_plugin.gated_loss on its logits instead."
        )


@dataclass(frozen=True)
class Measurement:
    """What a model's own forward does, in one state of the model.

    Args:
        transform: what it does to its logits.
        vocab_size: how many of the lm_head's columns it keeps.
        takes_labels: whether it leaves the loss to `loss_function` when it is given labels. Otherwise it is
            run without them, and a mixture's auxiliary loss is added here.
        auxiliary_coefficient: of that auxiliary loss; None where it had none.
        drops_masked_labels: whether its loss leaves out labels where attention_mask is 0.
    """

    transform: LogitsTransform = field(default_factory=LogitsTransform)
    vocab_size: int = 0
    takes_labels: bool = True
    auxiliary_coefficient: float | None = None
    drops_masked_labels: bool = False


def state_of(model: PreTrainedModel, layer: Any) -> tuple[Any, ...]:
    """What a measurement holds for: a user may change a softcap, PEFT put an adapter on the lm_head."""
    numbers = tuple(
        value
        for owner in (*configs_of(model), model)
        for name, value in vars(owner).items()
        if isinstance(value, int | float)
        and not name.startswith("_")
        and name != "accepts_loss_kwargs"
    )
    modules = len(list(layer.modules())) if isinstance(layer, nn.Module) else 0
    inner = innermost(layer)
    hooks = (len(inner._forward_pre_hooks), len(inner._forward_hooks))
    loss_function: Any = model.loss_function
    loss_function = getattr(loss_function, "__func__", loss_function)
    return type(layer), modules, hooks, id(loss_function), numbers


def probe_of(shape: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Numbers (*shape, V) of both signs over all magnitudes that matter, in no order; they ask for a gradient."""
    generator = torch.Generator().manual_seed(0)
    count = math.prod(shape) * width
    powers = torch.linspace(_SMALLEST_POWER, _LARGEST_POWER, count)
    signs = torch.randint(2, (count,), generator=generator) * 2 - 1
    numbers = (powers.exp2() * signs)[torch.randperm(count, generator=generator)]
    probe = numbers.reshape(*shape, width).to(device)
    return probe if torch.is_inference_mode_enabled() else probe.requires_grad_()


def measure(model: nn.Module, probe: Tensor, logits: Any) -> tuple[LogitsTransform, int]:
    """Scale, softcap and number of columns by which the forward has made `logits` of `probe`.

    Raises:
        UnknownForwardError: it has done something else.
    """
    if not isinstance(logits, Tensor) or logits.shape[:-1] != probe.shape[:-1]:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnknownForwardError(
            model, f"makes {shape} of logits of shape {tuple(probe.shape)} from its lm_head"
        )
    _check_no_parameters(model, probe, logits)
    vocab_size = min(logits.size(-1), probe.size(-1))
    if (logits[..., vocab_size:] > -1e30).any():
        raise UnknownForwardError(
            model,
            f"gives {logits.size(-1)} logits, {logits.size(-1) - vocab_size} of them not its lm_head's",
        )
    given = probe[..., :vocab_size].detach().double().cpu().flatten()
    found = logits[..., :vocab_size].detach().double().cpu().flatten()
    # Below every softcap that is one; the median, since bfloat16 rounds each number by up to 0.4 %.
    small = given.abs() <= given.abs().quantile(1 / 8)
    scale = (found[small] / given[small]).median().item()
    if abs(scale - 1) < 1e-3:
        scale = 1.0
    largest = int(given.abs().argmax())
    softcap = None
    if found[largest].abs() < abs(scale) * given[largest].abs() / 2:
        softcap = found[largest].abs().item()
    if not math.isfinite(scale) or scale == 0 or softcap == 0:
        raise UnknownForwardError(
            model, "gives another logits than its lm_head's, scaled or capped"
        )
    transform = LogitsTransform(scale, softcap)
    expected = transform(given)
    error = ((found - expected) / expected).abs().max().item()
    if not error <= 0.02:
        raise UnknownForwardError(
            model,
            f"gives another logits than its lm_head's, scaled and capped: with {transform} it differs by {error:.3g} "
            "of their size",
        )
    return transform, vocab_size


def _check_no_parameters(model: nn.Module, probe: Tensor, logits: Tensor) -> None:
    """Refuse what depends on more than the lm_head's logits: the parameters in it would not train."""
    for leaf in _leaves_of(logits):
        if leaf is not probe:
            names = [name for name, parameter in model.named_parameters() if parameter is leaf]
            raise UnknownForwardError(
                model,
                f"computes its logits with {names[0] if names else 'a tensor'} after its lm_head, which would get no "
                "gradient",
            )


def _leaves_of(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that ask for a gradient and that `tensor` was computed from."""
    functions, seen = [tensor.grad_fn], set()
    while functions:
        function: Any = functions.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            yield function.variable
        functions += [following for following, _ in function.next_functions]
