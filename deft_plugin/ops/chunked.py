"""The fused core: losses of hidden @ weight.T and their gradients with no [N, V] tensor, on any device.

A gate never touches the vocabulary. One tile of logits at a time becomes the error p - e_y; the tile is
multiplied at once into the gradients, and the gate is a row scale applied outside. So gradients are formed
in the forward pass, with one matrix product for the logits, one for the hidden states' gradient and,
for a trainable head, one for the weight's:

    d hidden = gate * (error @ weight)            the gate may come after the whole batch
    d weight = error.T @ (gate * hidden)          the gate must come first

Only where a gate depends on the whole batch and must come first, for a trainable head or for `skip_below`, is
there a separate pass for the statistics, one product more. A tile is folded by PyTorch's operations (`softmax`) or by a Triton kernel
(`triton_fold`); all else is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objectives import Objective, TokenStatistics
from .output import gradient_bound
from .projection import LogitsTransform
from .shard import VocabularyShard
from .softmax import StatisticsRequest, concatenate, fold_logits_, statistics_dtype

# Bytes of logits held at once. On a CPU a tile should stay near the last-level cache. An accelerator wants
# large products, and with a trainable head few tiles: each reads and writes the whole weight gradient.
CPU_TILE_BYTES = 24 * 2**20
FROZEN_TILE_BYTES = 256 * 2**20
TRAINABLE_TILE_BYTES = 2**30
SMALLEST_TILE_ROWS = 16
TILE_ROWS_MULTIPLE = 128
# Leaving rows out copies those that stay, about 7 % of the product that each of them has to pay for.
SMALLEST_SKIPPED_SHARE = 1 / 8


@dataclass(frozen=True)
class Head:
    """The constant half of a call: everything but the tensors that have gradients.

    Args:
        objective, transform, request: what to compute.
        targets: (n,) int64.
        rows: (n,) int64 rows of `hidden` that the targets belong to; None for all of them.
        product_dtype: dtype of the matrix products (the autocast dtype under autocast).
        tile_rows: number of tokens per tile.
        use_triton: whether Triton's kernel folds the tiles.
        skip_below: a token whose gradient is bounded by less than this share of its tile's mean earns no
            product; 0 for none.
        shard: which part of the vocabulary the weight is; None for all of it.
    """

    objective: Objective
    transform: LogitsTransform
    request: StatisticsRequest
    targets: Tensor
    rows: Tensor | None
    product_dtype: torch.dtype
    tile_rows: int
    use_triton: bool
    skip_below: float = 0.0
    shard: VocabularyShard | None = None

    def tiles(self) -> Iterator[tuple[slice, Tensor | slice]]:
        """(positions among the valid tokens, rows of `hidden`) of each tile; one, if empty, at least."""
        count = self.targets.numel()
        for start in range(0, max(count, 1), self.tile_rows):
            positions = slice(start, min(start + self.tile_rows, count))
            yield positions, positions if self.rows is None else self.rows[positions]


@dataclass(frozen=True)
class _Tile:
    """One tile after folding; the next one overwrites its error.

    Args:
        positions: where its tokens are among the valid ones.
        rows: which rows of `hidden` they are.
        error: (n, V), p - e_y times the softcap's derivative, up to `row_factor`.
        row_factor: (n,), what the error's rows are still to be multiplied by.
        statistics: of its n tokens.
    """

    positions: slice
    rows: Tensor | slice
    error: Tensor
    row_factor: Tensor
    statistics: TokenStatistics


def default_tile_rows(
    count: int, vocab_size: int, dtype: torch.dtype, device: torch.device, trainable: bool = False
) -> int:
    """Tokens per tile of `count` tokens, in tiles of about equal size that fit the device's buffer.

    Args:
        dtype: of the buffer's logits.
        trainable: whether the lm_head's gradient is wanted.
    """
    if device.type == "cpu":
        tile_bytes = CPU_TILE_BYTES
    else:
        tile_bytes = TRAINABLE_TILE_BYTES if trainable else FROZEN_TILE_BYTES
    most_rows = max(tile_bytes // (max(vocab_size, 1) * dtype.itemsize), SMALLEST_TILE_ROWS)
    tiles = max(-(-count // most_rows), 1)
    rows = max(-(-count // tiles), 1)
    if rows > TILE_ROWS_MULTIPLE:
        rows = min(-(-rows // TILE_ROWS_MULTIPLE) * TILE_ROWS_MULTIPLE, most_rows)
    return rows


def chunked_token_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head
) -> tuple[Tensor, Tensor, TokenStatistics, Tensor, Tensor | None]:
    """Sum of losses (), losses (n,), statistics, gates (n,) and whether skipped (n,) of the valid tokens.

    The sum and the losses are differentiable in hidden, weight and bias. Backward through the sum only
    scales the gradients that exist; so does backward through the losses where the head is frozen or
    all upstream gradients are equal. Otherwise the weight's gradient is formed again.

    Args:
        hidden: (N, H). weight: (V, H). bias: (V,) or None. Any floating dtype.
        head: the rest of the call.
    """
    wanted = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    ]
    total, losses, gate, skipped, *values = _ChunkedTokenLoss.apply(
        hidden, weight, bias, head, wanted
    )
    vocab_size = weight.size(0) if head.shard is None else head.shard.vocab_size
    return total, losses, TokenStatistics.of_tensors(vocab_size, *values), gate, skipped


class _ChunkedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        wanted: list[bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden.device.type, enabled=False):
            product_weight = weight.to(head.product_dtype)
            gradients = _Gradients(hidden, weight, bias, product_weight, head, wanted)
            need_gate = gradients.need_gate or (gradients.wanted and head.skip_below > 0)
            gate_first = need_gate and head.objective.couples_tokens
            collected, gates = [], []
            form_error = gradients.wanted and not gate_first
            for tile in _folded_tiles(hidden, product_weight, bias, head, form_error):
                collected.append(tile.statistics)
                if form_error:
                    gates += [head.objective.gate(tile.statistics)] if need_gate else []
                    gradients.add(tile, gates[-1] if need_gate else None)
            del tile
            statistics = concatenate(collected)
            # On a copy, since an objective may change what it is given.
            losses = head.objective.loss(statistics.log_p, statistics.clone())
            gate = torch.cat(gates) if gates else head.objective.gate(statistics)
            if gate_first:
                for tile in _folded_tiles(hidden, product_weight, bias, head, form_error=True):
                    gradients.add(tile, gate[tile.positions])
            if head.shard is not None and gradients.hidden is not None:
                head.shard.sum_(gradients.hidden)
        inputs = (hidden, weight, bias) if gradients.need_gate else (None, None, None)
        ctx.save_for_backward(gate, gradients.hidden, gradients.weight, gradients.bias, *inputs)
        ctx.head, ctx.wanted = head, wanted
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
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
        gate, hidden_gradient, weight_gradient, bias_gradient, *inputs = ctx.saved_tensors
        head: Head = ctx.head
        if total_gradient is None and loss_gradients is None:
            return None, None, None, None, None
        # One number when every token has the same upstream gradient, else one per token.
        upstream = total_gradient
        if loss_gradients is not None:
            upstream = loss_gradients if upstream is None else loss_gradients + upstream
            assert upstream is not None
            if inputs[0] is not None:
                if upstream.numel() and bool((upstream == upstream[0]).all()):
                    upstream = upstream[0]
                elif upstream.numel():
                    weight_gradient, bias_gradient = _weighted_again(
                        inputs, head, ctx.wanted, gate * upstream
                    )
        assert upstream is not None
        # Scaling in place saves a copy of every gradient, but a retained graph may come here again.
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()

        def scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
            if gradient is None:
                return None
            if gradient.dtype != dtype:
                return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
            return gradient.mul_(scale) if in_place else gradient * scale

        row_scale = (gate * upstream).unsqueeze(1)
        if hidden_gradient is not None and head.rows is not None:
            full = row_scale.new_zeros(hidden_gradient.size(0), 1)
            row_scale = full.index_copy(0, head.rows, row_scale)
        if upstream.dim() == 1:
            # Formed again above with the per-token gradients in it.
            upstream = upstream.new_ones(())
        return (
            scaled(hidden_gradient, row_scale, ctx.dtypes[0]),
            scaled(weight_gradient, upstream, ctx.dtypes[1]),
            scaled(bias_gradient, upstream, ctx.dtypes[2]),
            None,
            None,
        )


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


class _Gradients:
    """Buffers that the tiles' errors are multiplied into; None where no gradient is wanted.

    hidden: (N, H) in the hidden states' dtype, without the gate; weight (V, H) and bias (V,) in
    float32 or float64, with it.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        product_weight: Tensor,
        head: Head,
        wanted: list[bool],
    ) -> None:
        self.head = head
        self.hidden_states = hidden
        self.product_weight = product_weight
        accumulator = statistics_dtype(head.product_dtype)
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        # The first tile overwrites these.
        self.weight = torch.empty_like(weight, dtype=accumulator) if wanted[1] else None
        self.bias = (
            torch.empty_like(bias, dtype=accumulator) if bias is not None and wanted[2] else None
        )
        self._keep = 0
        self.skipped = torch.zeros_like(head.targets, dtype=torch.bool) if head.skip_below else None
        self.wanted = any(wanted)
        self.need_gate = wanted[1] or wanted[2]

    def add(self, tile: _Tile, gate: Tensor | None) -> None:
        """Multiply a tile's error into the buffers."""
        row_scale = tile.row_factor * self.head.transform.scale
        error, rows = tile.error, tile.rows
        kept = None if gate is None else self._rows_that_earn(tile, gate)
        if kept is not None and gate is not None:
            error, gate = error[kept], gate[kept]
            rows = kept + rows.start if isinstance(rows, slice) else rows[kept]
            row_scale = row_scale[kept]
        if self.hidden is not None:
            product = error.to(self.product_weight.dtype) @ self.product_weight
            product.mul_(row_scale.unsqueeze(1))
            self.hidden[rows] = product.to(self.hidden.dtype)
        if gate is None:
            return
        gate = gate * row_scale
        if self.weight is not None:
            scaled = self.hidden_states[rows] * gate.unsqueeze(1)
            _add_product_(self.weight, self._keep, error.t(), scaled.to(error.dtype))
        if self.bias is not None:
            right = gate.unsqueeze(1).to(error.dtype)
            _add_product_(self.bias.unsqueeze(1), self._keep, error.t(), right)
        self._keep = 1

    def _rows_that_earn(self, tile: _Tile, gate: Tensor) -> Tensor | None:
        """Rows of the tile whose gradient is worth a product; None for all. Synchronises with the host."""
        if self.skipped is None:
            return None
        bound = gradient_bound(tile.statistics.log_p, gate)
        # Written so that NaN is kept.
        skipped = bound < self.head.skip_below * bound.mean()
        kept = (~skipped).nonzero().squeeze(1)
        if kept.numel() > (1 - SMALLEST_SKIPPED_SHARE) * bound.numel():
            return None
        self.skipped[tile.positions] = skipped
        return kept


def _add_product_(accumulator: Tensor, keep: int, left: Tensor, right: Tensor) -> None:
    """accumulator = keep * accumulator + left @ right, in its precision whatever the factors' dtype.

    With keep = 0 the accumulator may hold anything, NaN included.
    """
    if left.dtype == accumulator.dtype:
        accumulator.addmm_(left, right, beta=keep)
    elif _accumulates_in_float32(left.device.type, left.dtype):
        torch.ops.aten.addmm.dtype_out(
            accumulator, left, right, accumulator.dtype, beta=keep, out=accumulator
        )
    else:
        dtype = accumulator.dtype
        accumulator.addmm_(left.to(dtype), right.to(dtype), beta=keep)


@functools.cache
def _accumulates_in_float32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this device adds half-precision products to a float32 matrix without a copy of either."""
    factor = torch.ones(16, 16, dtype=dtype, device=device_type)
    accumulator = torch.ones(16, 16, dtype=torch.float32, device=device_type)
    try:
        torch.ops.aten.addmm.dtype_out(accumulator, factor, factor, torch.float32, out=accumulator)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((accumulator == 17).all())


def _folded_tiles(
    hidden: Tensor, product_weight: Tensor, bias: Tensor | None, head: Head, form_error: bool
) -> Iterator[_Tile]:
    """Project and fold one tile after the other, all in one buffer."""
    dtype = buffer_dtype(head.product_dtype, head.use_triton)
    buffer_rows = min(head.tile_rows, head.targets.numel())
    buffer = torch.empty(
        buffer_rows, product_weight.size(0), dtype=dtype, device=product_weight.device
    )
    for positions, rows in head.tiles():
        hidden_tile = hidden[rows].to(head.product_dtype)
        logits = buffer[: hidden_tile.size(0)]
        if dtype == head.product_dtype:
            torch.mm(hidden_tile, product_weight.t(), out=logits)
        else:
            logits.copy_(hidden_tile @ product_weight.t())
        targets = head.targets[positions]
        if head.use_triton:
            from .triton_fold import triton_fold_

            error, row_factor, statistics = triton_fold_(
                logits, bias, head.transform, targets, head.request, form_error
            )
        else:
            if bias is not None:
                logits.add_(bias)
            derivative = head.transform.apply_(logits)
            error, row_factor, statistics = fold_logits_(logits, targets, head.request, head.shard)
            if form_error and derivative is not None:
                error.mul_(derivative)
            if form_error and head.product_dtype == torch.float16:
                # Its largest number is smaller than the target's entry may be.
                error.mul_(row_factor.unsqueeze(1))
                row_factor = torch.ones_like(row_factor)
        yield _Tile(positions, rows, error, row_factor, statistics)


def buffer_dtype(product_dtype: torch.dtype, use_triton: bool) -> torch.dtype:
    """Of a tile's logits: the products' own, as a model's own logits are, or what PyTorch folds in."""
    return product_dtype if use_triton else statistics_dtype(product_dtype)


def _weighted_again(
    inputs: list[Tensor | None], head: Head, wanted: list[bool], token_weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias gradients for a gate times upstream gradient that differs between tokens."""
    hidden, weight, bias = inputs
    assert hidden is not None
    assert weight is not None
    if weight.size(0) == 0 and head.shard is None:
        raise RuntimeError(
            "Upstream gradients that differ between tokens need the lm_head's weight in the "
            "backward pass, where it is partitioned away (ZeRO-3). Use the scalar `loss`, or weight "
            "tokens in an objective of your own."
        )
    with torch.autocast(hidden.device.type, enabled=False):
        product_weight = weight.to(head.product_dtype)
        wanted = [False, *wanted[1:]]
        gradients = _Gradients(hidden, weight, bias, product_weight, head, wanted)
        for tile in _folded_tiles(hidden, product_weight, bias, head, form_error=True):
            gradients.add(tile, token_weight[tile.positions])
    return gradients.weight, gradients.bias
