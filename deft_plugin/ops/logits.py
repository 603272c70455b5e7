"""`gated_loss`: an objective's loss of logits that already exist."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..objectives import Objective, TokenStatistics, build_objective
from .fold import fold_, top_k_entropy
from .output import GatedLoss, Reduction, assemble, check_reduction
from .projection import LogitsTransform
from .sums import StatisticsRequest, Sums, empty_sums, statistics_dtype, statistics_of_sums
from .targets import ValidTargets, described
from .tiles import default_tile_rows, tile_positions
from .token_loss import refuse_second_derivative


def gated_loss(
    logits: Tensor,
    targets: Tensor,
    objective: str | Objective = "deft",
    *,
    parameters: Mapping[str, Any] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    with_entropy: bool = False,
) -> GatedLoss:
    """An objective's loss of given logits, for models whose logits are built anyway.

    No float32 copy of the logits is made and nothing of their size is kept for the backward pass, which
    forms the gradient p - e_y from the logits themselves. Where you have hidden states and the
    lm_head's weight, `linear_gated_loss` needs far less memory.

    Args:
        logits: (..., V), floating. -inf entries have probability 0.
        targets: logits' shape without V; integers in [0, V), or `ignore_index`. Not shifted here.
        objective, parameters, ignore_index, reduction, num_items_in_batch, with_entropy: as in
            `linear_gated_loss`.

    Raises:
        ValueError: as `linear_gated_loss`.
    """
    objective = build_objective(objective, parameters)
    check_reduction(reduction, num_items_in_batch)
    if (
        logits.dim() < 1
        or not logits.size(-1)
        or not logits.is_floating_point()
        or not isinstance(targets, Tensor)
        or targets.shape != logits.shape[:-1]
    ):
        raise ValueError(
            f"logits must be floating (..., V), V at least 1, and targets a tensor of their shape without V; they are "
            f"{logits.dtype} {tuple(logits.shape)} and {described(targets)}."
        )
    valid = ValidTargets.check(targets, logits.size(-1), ignore_index)
    flat = logits.reshape(-1, logits.size(-1))
    losses, gate, *values = _TokenLossOfLogits.apply(
        flat, valid, objective, StatisticsRequest.of(objective, with_entropy)
    )
    return assemble(
        objective,
        valid,
        losses.sum(),
        losses,
        TokenStatistics.of_tensors(logits.size(-1), *values),
        gate,
        with_entropy=with_entropy,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
    )


class _TokenLossOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        valid: ValidTargets,
        objective: Objective,
        request: StatisticsRequest,
    ) -> tuple[Tensor | None, ...]:
        ctx.valid = valid
        sums = empty_sums(valid.targets.numel(), logits.dtype, logits.device)
        top_k = []
        for positions, rows in _tiles(logits, valid):
            tile = _copied(logits[rows])
            if request.top_k is not None:
                top_k.append(top_k_entropy(tile, None, LogitsTransform(), request.top_k))
            targets = valid.targets[positions]
            fold_(tile, None, LogitsTransform(), targets, request, sums[:, positions], False)
        statistics = statistics_of_sums(
            sums, logits.size(1), request, torch.cat(top_k) if top_k else None
        )
        gate = objective.gate(statistics)
        ctx.save_for_backward(logits, gate)
        values = statistics.tensors()
        ctx.mark_non_differentiable(gate, *(value for value in values if value is not None))
        return objective.loss(statistics.log_p, statistics.clone()), gate, *values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        logits, gate = ctx.saved_tensors
        token_weight = gate * upstream
        gradient = torch.zeros_like(logits)
        targets = ctx.valid.targets
        sums = empty_sums(targets.numel(), logits.dtype, logits.device)
        for positions, rows in _tiles(logits, ctx.valid):
            error, tile_sums = _copied(logits[rows]), sums[:, positions]
            fold_(
                error, None, LogitsTransform(), targets[positions], StatisticsRequest(), tile_sums
            )
            row_scale = Sums(*tile_sums).row_factor * token_weight[positions]
            gradient[rows] = error.mul_(row_scale.unsqueeze(1)).to(logits.dtype)
        return gradient, None, None, None


def _tiles(logits: Tensor, valid: ValidTargets) -> Iterator[tuple[slice, Tensor | slice]]:
    """(positions among the valid tokens, rows of the logits) of each tile; at least one tile."""
    count = valid.targets.numel()
    dtype = statistics_dtype(logits.dtype)
    tile_rows = default_tile_rows(count, logits.size(1), dtype, logits.device)
    for positions in tile_positions(count, tile_rows):
        yield positions, positions if valid.rows is None else valid.rows[positions]


def _copied(logits: Tensor) -> Tensor:
    return logits.to(statistics_dtype(logits.dtype), copy=True)
