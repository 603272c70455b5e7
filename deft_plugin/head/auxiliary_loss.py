"""The load-balancing loss of a mixture of experts, which a model's own forward adds to its loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .configuration import numbers_of
from .measurement import UnknownForwardError


def auxiliary_loss_of(output: Any) -> Tensor | None:
    """What a forward's output has of it, (); None where router logits were not asked for, or there are none."""
    aux_loss = getattr(output, "aux_loss", None)
    return aux_loss if isinstance(aux_loss, Tensor) else None


def coefficient_of(
    model: PreTrainedModel, loss: Tensor, counted: Tensor, aux_loss: Tensor
) -> float:
    """The coefficient with which a loss () has its auxiliary loss () beside what is counted (), out of the configuration.

    Raises:
        UnknownForwardError: none of its numbers makes what the loss has besides.
    """
    remainder = (loss - counted).item()
    candidates = (0.0, *numbers_of(model))
    coefficient = min(candidates, key=lambda number: abs(remainder - number * aux_loss.item()))
    expected = coefficient * aux_loss.item()
    if not abs(remainder - expected) <= 1e-5 * abs(counted.item()) + 1e-3 * abs(expected):
        raise UnknownForwardError(
            model,
            f"adds {remainder:.3g} to its loss, which no coefficient of its configuration makes of its auxiliary loss "
            f"({aux_loss.item():.3g})",
        )
    return coefficient


def with_auxiliary_loss(
    model: PreTrainedModel, loss: Tensor, output: Any, coefficient: float | None
) -> Tensor:
    """`loss` with that of the output of a forward that was not given labels.

    Args:
        model: whose output it is.
        loss: ().
        output: of the model's own forward.
        coefficient: as it was found out; None takes the configuration's.
    """
    aux_loss = auxiliary_loss_of(output)
    if aux_loss is None:
        return loss
    if coefficient is None:
        coefficient = getattr(model, "router_aux_loss_coef", None)
    if coefficient is None:
        coefficient = model.config.router_aux_loss_coef
    return loss + float(coefficient) * aux_loss.to(loss.device)
