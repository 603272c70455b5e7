"""What every path of the core gives: a loss and statistics of tokens, spread over the targets' shape."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal

from torch import Tensor

from ..objectives import Objective, TokenStatistics
from .targets import ValidTargets

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class GatedLoss:
    """A loss and what its gates did. Per-token tensors have the targets' shape and hold 0 where ignored.

    Args:
        loss: scalar, differentiable. Under "mean" the sum over valid tokens divided by their number,
            or by `num_items_in_batch` where given; 0 when no token is valid.
        token_loss: differentiable per-token losses.
        mask: bool; which targets are valid (not `ignore_index`).
        log_p: log-probability of the target, in nats.
        gate: the factor on the token's gradient.
        focus: the exponent a; None for objectives outside the deformed-log family.
        entropy: Shannon entropy in nats; None unless asked for.
        is_top1: bool; whether the target has the largest logit.
        skipped: share of the token's entries, 0 to 1, that the gradients' products left out; None unless
            `skip_below` is set and there are gradients.

    All but `loss` and `token_loss` are detached. Dtype float32, or float64 for float64 input.
    """

    loss: Tensor
    token_loss: Tensor
    mask: Tensor
    log_p: Tensor
    gate: Tensor
    focus: Tensor | None
    entropy: Tensor | None
    is_top1: Tensor
    skipped: Tensor | None = None


def assemble(
    objective: Objective,
    valid: ValidTargets,
    total: Tensor,
    token_loss: Tensor,
    statistics: TokenStatistics,
    gate: Tensor,
    skipped: Tensor | None = None,
    *,
    with_entropy: bool,
    reduction: Reduction,
    num_items_in_batch: int | Tensor | None,
) -> GatedLoss:
    """A `GatedLoss` from compact (n,) values and their differentiable sum `total`."""
    focus = objective.focus(statistics)
    assert statistics.is_top1 is not None
    return GatedLoss(
        loss=normalise(total, valid.targets.numel(), reduction, num_items_in_batch),
        token_loss=valid.spread(token_loss),
        mask=valid.mask,
        log_p=valid.spread(statistics.log_p.detach()),
        gate=valid.spread(gate.detach()),
        focus=None if focus is None else valid.spread(focus.detach()),
        entropy=valid.spread(statistics.entropy.detach())  # type: ignore[union-attr]
        if with_entropy
        else None,
        is_top1=valid.spread(statistics.is_top1),
        skipped=None if skipped is None else valid.spread(skipped),
    )


def normalise(
    total: Tensor, valid_count: int, reduction: Reduction, num_items_in_batch: int | Tensor | None
) -> Tensor:
    """`total` over the number of tokens it is a mean of.

    With `num_items_in_batch`, the tokens of the whole optimizer step on all ranks, gradients do not depend
    on how the step is split into micro-batches. A step without any valid token has loss 0, not 0/0.
    """
    if reduction == "sum":
        return total
    if num_items_in_batch is None:
        return total / max(valid_count, 1)
    if isinstance(num_items_in_batch, Tensor):
        return total / num_items_in_batch.to(total.device).reshape(()).clamp(min=1)
    return total / max(num_items_in_batch, 1)


def check_reduction(reduction: str, num_items_in_batch: int | Tensor | None) -> None:
    """Raise `ValueError` for an unknown reduction or one that would ignore `num_items_in_batch`."""
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction={reduction!r} is not valid. Choices: 'mean', 'sum'. Per-token losses are "
            "always in the result's `token_loss`."
        )
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                "num_items_in_batch must be one number; it is a tensor of shape "
                f"{tuple(num_items_in_batch.shape)}."
            )
    elif num_items_in_batch is not None and not (
        isinstance(num_items_in_batch, Real) and num_items_in_batch >= 0
    ):
        raise ValueError(
            f"num_items_in_batch is {num_items_in_batch!r}; it must be a number >= 0, or None."
        )
    if reduction == "sum" and num_items_in_batch is not None:
        raise ValueError("num_items_in_batch would be ignored with reduction='sum': leave it out.")
