"""The fused core: losses of hidden @ weight.T and their gradients with no [N, V] tensor, on any device.

A gate never touches the vocabulary. One tile of logits at a time becomes the error p - e_y; the tile is
multiplied at once into the gradients, and the gate is a row scale applied outside. So gradients are formed
in the forward pass, with one matrix product for the logits, one for the hidden states' gradient and,
for a trainable lm_head, one for the weight's:

    d hidden = gate * (error @ weight)            the gate may come after the whole batch
    d weight = error.T @ (gate * hidden)          the gate must come first

A low-rank addition to the weight is a second pair of hidden and weight, of few columns, with the same products.

Only where a gate depends on the whole batch and must come first, for a trainable lm_head or for `skip_below`, is
there a separate pass for the statistics, one product more. A tile is folded by PyTorch's operations (`fold`) or by a
Triton kernel (`triton_fold`), or has no logits in the first place (`quack_tiles`); all else is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..objectives import TokenStatistics
from .folded_tiles import FoldedTiles
from .gradients import PER_TOKEN, Gradients
from .plan import Plan
from .projection import Operands


def tiled_token_loss(
    operands: Operands, plan: Plan
) -> tuple[Tensor, Tensor, TokenStatistics, Tensor, Tensor | None]:
    """Sum of losses (), losses (n,), statistics, gates (n,) and skipped shares (n,) of the valid tokens.

    The sum and the losses are differentiable in the operands. Backward through the sum only
    scales the gradients that exist; so does backward through the losses where the lm_head is frozen or
    all upstream gradients are equal. Otherwise the weights' gradients are formed again.
    """
    wanted = frozenset(
        name
        for name, tensor in operands._asdict().items()
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
    )
    total, losses, gate, skipped, *values = _TiledTokenLoss.apply(plan, wanted, *operands)
    return total, losses, TokenStatistics.of_tensors(plan.vocab_size, *values), gate, skipped


class _TiledTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, wanted: frozenset[str], *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        operands = Operands(*tensors)
        with torch.autocast(operands.hidden.device.type, enabled=False):
            operands = operands.with_weights_in(plan.product_dtype)
            gradients = Gradients(operands, plan, wanted)
            tiles = FoldedTiles(operands, plan)
            need_gate = gradients.need_gate or (gradients.wanted and plan.skip_below > 0)
            gate_first = need_gate and plan.objective.couples_tokens
            gates = []
            write_error = gradients.wanted and not gate_first
            for tile in tiles(write_error):
                if write_error:
                    if need_gate:
                        gates.append(plan.objective.gate(tiles.statistics(tile.positions)))
                    gradients.add(tile, gates[-1] if need_gate else None, tiles)
            del tile
            statistics = tiles.statistics()
            # On a copy, since an objective may change what it is given.
            losses = plan.objective.loss(statistics.log_p, statistics.clone())
            gate = torch.cat(gates) if gates else plan.objective.gate(statistics)
            if gate_first:
                for tile in tiles(write_error=True):
                    gradients.add(tile, gate[tile.positions], tiles)
            if plan.shard is not None:
                for gradient in (gradients.hidden, gradients.low_rank_hidden):
                    if gradient is not None:
                        plan.shard.sum_(gradient)
        saved = tensors if gradients.need_gate else [None] * len(tensors)
        row_scale = gate * tiles.sums[-1] * plan.transform.scale
        ctx.save_for_backward(gate, row_scale, *gradients.tensors(), *saved)
        ctx.plan, ctx.wanted, ctx.row_count = plan, wanted, operands.hidden.size(0)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        values = statistics.tensors()
        skipped = gradients.skipped
        constants = [value for value in (gate, skipped, *values) if value is not None]
        ctx.mark_non_differentiable(*constants)
        return losses.sum(), losses, gate, skipped, *values

    @staticmethod
    def backward(
        ctx: Any, total_gradient: Tensor | None, loss_gradients: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        gate, row_scale, *saved = ctx.saved_tensors
        count = len(Operands._fields)
        gradients, tensors = saved[:count], saved[count:]
        plan: Plan = ctx.plan
        if total_gradient is None and loss_gradients is None:
            return None, None, *(None for _ in gradients)
        # One number when every token has the same upstream gradient, else one per token.
        upstream = total_gradient
        if loss_gradients is not None:
            upstream = loss_gradients if upstream is None else loss_gradients + upstream
            assert upstream is not None
            if tensors[0] is not None:
                if upstream.numel() and bool((upstream == upstream[0]).all()):
                    upstream = upstream[0]
                elif upstream.numel():
                    again = _weighted_again(Operands(*tensors), plan, ctx.wanted, gate * upstream)
                    gradients = [
                        gradient if formed is None else formed
                        for gradient, formed in zip(gradients, again, strict=True)
                    ]
        assert upstream is not None
        # Scaling in place saves a copy of every gradient, but a retained graph may come here again.
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()

        def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
            if gradient.dtype != dtype:
                return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
            return gradient.mul_(scale) if in_place else gradient * scale

        def of_all_rows(gradient: Tensor) -> Tensor:
            if plan.rows is None:
                return gradient
            full = gradient.new_zeros(ctx.row_count, gradient.size(1))
            return full.index_copy_(0, plan.rows, gradient)

        row_scale = (row_scale * upstream).unsqueeze(1)
        if upstream.dim() == 1:
            # Formed again above with the per-token gradients in it.
            upstream = upstream.new_ones(())
        results: list[Tensor | None] = []
        for name, gradient, dtype in zip(Operands._fields, gradients, ctx.dtypes, strict=True):
            if gradient is None:
                results.append(None)
            elif name in PER_TOKEN:
                results.append(of_all_rows(scaled(gradient, row_scale, dtype)))
            else:
                results.append(scaled(gradient, upstream, dtype))
        return None, None, *results


def refuse_second_derivative() -> None:
    """Raise `RuntimeError` in a backward pass with create_graph=True.

    Gradients formed in the forward pass are constants to autograd: a penalty on them, or a Hessian, would
    silently miss the loss's own curvature. (`once_differentiable` refuses only upstream gradients
    that require gradients.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "This loss has no second derivative (create_graph=True). path='reference' of "
            "linear_gated_loss has one."
        )


def _weighted_again(
    operands: Operands, plan: Plan, wanted: frozenset[str], token_weight: Tensor
) -> list[Tensor | None]:
    """The weights' gradients for a gate times upstream gradient that differs between tokens.

    In the order of `Operands`; None for hidden states.
    """
    if operands.weight.size(0) == 0 and plan.shard is None:
        raise RuntimeError(
            "Upstream gradients that differ between tokens need the lm_head's weight in the "
            "backward pass, where it is partitioned away (ZeRO-3). Use the scalar `loss`, or weight "
            "tokens in an objective of your own."
        )
    with torch.autocast(operands.hidden.device.type, enabled=False):
        operands = operands.with_weights_in(plan.product_dtype)
        gradients = Gradients(operands, plan, wanted - PER_TOKEN)
        tiles = FoldedTiles(operands, plan)
        for tile in tiles(write_error=True):
            gradients.add(tile, token_weight[tile.positions], tiles)
    return gradients.tensors()
