"""What every path of the core takes and gives: checked targets in, losses and statistics out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..objectives import Objective, TokenStatistics

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
        skipped: share of the token's entries, 0 to 1, that the gradients' products left out; None unless `skip_below` is set.

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


@dataclass(frozen=True)
class ValidTargets:
    """The targets that count.

    Args:
        mask: bool, the targets' shape.
        rows: (n,) int64 positions of the valid targets in flattened order; None when all are valid.
        targets: (n,) int64, in [0, V).
    """

    mask: Tensor
    rows: Tensor | None
    targets: Tensor

    @classmethod
    def check(cls, targets: Tensor, vocab_size: int, ignore_index: int) -> ValidTargets:
        """Find the valid targets; one host synchronisation on an accelerator.

        Raises:
            ValueError: a target is neither `ignore_index` nor in [0, vocab_size), or is no integer.
        """
        if not isinstance(targets, Tensor):
            raise ValueError(f"targets must be a tensor of integers, not {type(targets).__name__}.")
        if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
            raise ValueError(f"ignore_index is {ignore_index!r}; it must be an integer.")
        if targets.is_floating_point() or targets.dtype == torch.bool or targets.is_complex():
            raise ValueError(f"targets must be integers; their dtype is {targets.dtype}.")
        # In int64, since a byte cannot be compared with -100.
        targets = targets.long()
        mask = targets != ignore_index
        outside = mask & ((targets < 0) | (targets >= vocab_size))
        valid_count, outside_count = torch.stack((mask.sum(), outside.sum())).tolist()
        if outside_count:
            raise ValueError(
                f"{outside_count} of {valid_count} targets are outside the vocabulary "
                f"[0, {vocab_size}), the first being {targets[outside][0].item()}. Do tokenizer and "
                f"model match? A position to be skipped must hold ignore_index={ignore_index}."
            )
        flat = targets.reshape(-1)
        if valid_count == flat.numel():
            return cls(mask, None, flat)
        rows = torch.nonzero_static(mask.reshape(-1), size=valid_count).squeeze(1)
        return cls(mask, rows, flat[rows])

    def spread(self, values: Tensor) -> Tensor:
        """(n,) values of valid tokens, in the targets' shape with zeros elsewhere."""
        if self.rows is None:
            return values.view(self.mask.shape)
        flat = values.new_zeros(self.mask.numel())
        return flat.index_put((self.rows,), values).view(self.mask.shape)


def described(targets: Any) -> str:
    """What `targets` are, for a message."""
    if isinstance(targets, Tensor):
        return f"of shape {tuple(targets.shape)}"
    return f"a {type(targets).__name__}"


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
        isinstance(num_items_in_batch, (int, float)) and num_items_in_batch >= 0
    ):
        raise ValueError(
            f"num_items_in_batch is {num_items_in_batch!r}; it must be a number >= 0, or None."
        )
    if reduction == "sum" and num_items_in_batch is not None:
        raise ValueError("num_items_in_batch would be ignored with reduction='sum': leave it out.")
