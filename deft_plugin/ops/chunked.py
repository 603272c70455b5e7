"""The fused core: losses of hidden @ weight.T and their gradients with no [N, V] tensor, on any device.

A gate never touches the vocabulary. One tile of logits at a time becomes the error p - e_y; the tile is
multiplied at once into the gradients, and the gate is a row scale applied outside. So gradients are formed
in the forward pass, with one matrix product for the logits, one for the hidden states' gradient and,
for a trainable head, one for the weight's:

    d hidden = gate * (error @ weight)            the gate may come after the whole batch
    d weight = error.T @ (gate * hidden)          the gate must come first

A low-rank addition to the weight is a second pair of hidden and weight, of few columns, with the same products.

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
from .projection import LogitsTransform, Operands
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

# Operands with a row per token: the gate comes into their gradients in the backward pass, as a factor per row.
_PER_TOKEN = frozenset({"hidden", "low_rank_hidden"})


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
    operands: Operands, head: Head
) -> tuple[Tensor, Tensor, TokenStatistics, Tensor, Tensor | None]:
    """Sum of losses (), losses (n,), statistics, gates (n,) and whether skipped (n,) of the valid tokens.

    The sum and the losses are differentiable in the operands. Backward through the sum only
    scales the gradients that exist; so does backward through the losses where the head is frozen or
    all upstream gradients are equal. Otherwise the head's own gradients are formed again.
    """
    wanted = frozenset(
        name
        for name, tensor in operands._asdict().items()
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
    )
    total, losses, gate, skipped, *values = _ChunkedTokenLoss.apply(head, wanted, *operands)
    vocab_size = operands.weight.size(0) if head.shard is None else head.shard.vocab_size
    return total, losses, TokenStatistics.of_tensors(vocab_size, *values), gate, skipped


class _ChunkedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: Head, wanted: frozenset[str], *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        operands = Operands(*tensors)
        with torch.autocast(operands.hidden.device.type, enabled=False):
            operands = operands.with_weights_in(head.product_dtype)
            gradients = _Gradients(operands, head, wanted)
            need_gate = gradients.need_gate or (gradients.wanted and head.skip_below > 0)
            gate_first = need_gate and head.objective.couples_tokens
            collected, gates = [], []
            form_error = gradients.wanted and not gate_first
            for tile in _folded_tiles(operands, head, form_error):
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
                for tile in _folded_tiles(operands, head, form_error=True):
                    gradients.add(tile, gate[tile.positions])
            if head.shard is not None:
                for gradient in (gradients.hidden, gradients.low_rank_hidden):
                    if gradient is not None:
                        head.shard.sum_(gradient)
        saved = tensors if gradients.need_gate else [None] * len(tensors)
        ctx.save_for_backward(gate, *gradients.tensors(), *saved)
        ctx.head, ctx.wanted, ctx.row_count = head, wanted, operands.hidden.size(0)
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
        gate, *saved = ctx.saved_tensors
        count = len(Operands._fields)
        gradients, tensors = saved[:count], saved[count:]
        head: Head = ctx.head
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
                    again = _weighted_again(Operands(*tensors), head, ctx.wanted, gate * upstream)
                    gradients = [
                        gradient if formed is None else formed
                        for gradient, formed in zip(gradients, again, strict=True)
                    ]
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
        if head.rows is not None and ctx.wanted & _PER_TOKEN:
            full = row_scale.new_zeros(ctx.row_count, 1)
            row_scale = full.index_copy(0, head.rows, row_scale)
        if upstream.dim() == 1:
            # Formed again above with the per-token gradients in it.
            upstream = upstream.new_ones(())
        scales = [row_scale if name in _PER_TOKEN else upstream for name in Operands._fields]
        return None, None, *map(scaled, gradients, scales, ctx.dtypes)


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

    hidden (N, H) and low_rank_hidden (N, r) in their operand's dtype, without the gate; weight (V, H),
    bias (V,) and low_rank_weight (V, r) in float32 or float64, with it.
    """

    def __init__(self, operands: Operands, head: Head, wanted: frozenset[str]) -> None:
        self.head = head
        self.operands = operands
        accumulator = statistics_dtype(head.product_dtype)

        def buffer(name: str) -> Tensor | None:
            if name not in wanted:
                return None
            operand = getattr(operands, name)
            if name in _PER_TOKEN:
                return torch.zeros_like(operand)
            # The first tile overwrites it.
            return torch.empty_like(operand, dtype=accumulator)

        self.hidden = buffer("hidden")
        self.weight = buffer("weight")
        self.bias = buffer("bias")
        self.low_rank_hidden = buffer("low_rank_hidden")
        self.low_rank_weight = buffer("low_rank_weight")
        self._keep = 0
        self.skipped = torch.zeros_like(head.targets, dtype=torch.bool) if head.skip_below else None
        self.wanted = bool(wanted)
        self.need_gate = bool(wanted - _PER_TOKEN)

    def tensors(self) -> list[Tensor | None]:
        """The buffers, in the order of `Operands`."""
        return [getattr(self, name) for name in Operands._fields]

    def add(self, tile: _Tile, gate: Tensor | None) -> None:
        """Multiply a tile's error into the buffers."""
        row_scale = tile.row_factor * self.head.transform.scale
        error, rows = tile.error, tile.rows
        kept = None if gate is None else self._rows_that_earn(tile, gate)
        if kept is not None and gate is not None:
            error, gate = error[kept], gate[kept]
            rows = kept + rows.start if isinstance(rows, slice) else rows[kept]
            row_scale = row_scale[kept]
        if self.hidden is not None or self.low_rank_hidden is not None:
            self._add_per_token(error, rows, row_scale.unsqueeze(1))
        if gate is not None:
            self._add_per_weight(error, rows, (gate * row_scale).unsqueeze(1))

    def _add_per_token(self, error: Tensor, rows: Tensor | slice, scale: Tensor) -> None:
        """Put scale * (error @ weight) into the rows of hidden and low_rank_hidden."""
        error = error.to(self.head.product_dtype)
        gradients = (self.hidden, self.low_rank_hidden)
        for (_, weight), gradient in zip(self.operands.products(), gradients, strict=False):
            if gradient is not None:
                gradient[rows] = (error @ weight).mul_(scale).to(gradient.dtype)

    def _add_per_weight(self, error: Tensor, rows: Tensor | slice, scale: Tensor) -> None:
        """Add error.T @ (scale * hidden) to weight and low_rank_weight, and error.T @ scale to bias."""
        gradients = (self.weight, self.low_rank_weight)
        for (hidden, _), gradient in zip(self.operands.products(), gradients, strict=False):
            if gradient is not None:
                scaled = (hidden[rows] * scale).to(error.dtype)
                _add_product_(gradient, self._keep, error.t(), scaled)
        if self.bias is not None:
            _add_product_(self.bias.unsqueeze(1), self._keep, error.t(), scale.to(error.dtype))
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


def _folded_tiles(operands: Operands, head: Head, form_error: bool) -> Iterator[_Tile]:
    """Project and fold one tile after the other, all in one buffer.

    Args:
        operands: with weights in the products' dtype.
        form_error: whether the tiles' errors are wanted beside their statistics.
    """
    dtype = buffer_dtype(head.product_dtype, head.use_triton)
    (hidden, weight), *low_rank = operands.products()
    bias = operands.bias
    buffer_rows = min(head.tile_rows, head.targets.numel())
    buffer = torch.empty(buffer_rows, weight.size(0), dtype=dtype, device=weight.device)
    for positions, rows in head.tiles():
        hidden_tile = hidden[rows].to(head.product_dtype)
        logits = buffer[: hidden_tile.size(0)]
        if dtype == head.product_dtype:
            torch.mm(hidden_tile, weight.t(), out=logits)
        else:
            logits.copy_(hidden_tile @ weight.t())
        for low_rank_hidden, low_rank_weight in low_rank:
            low_rank_tile = low_rank_hidden[rows].to(head.product_dtype)
            _add_product_(logits, 1, low_rank_tile, low_rank_weight.t())
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
    operands: Operands, head: Head, wanted: frozenset[str], token_weight: Tensor
) -> list[Tensor | None]:
    """The head's gradients for a gate times upstream gradient that differs between tokens.

    In the order of `Operands`; None for hidden states.
    """
    if operands.weight.size(0) == 0 and head.shard is None:
        raise RuntimeError(
            "Upstream gradients that differ between tokens need the lm_head's weight in the "
            "backward pass, where it is partitioned away (ZeRO-3). Use the scalar `loss`, or weight "
            "tokens in an objective of your own."
        )
    with torch.autocast(operands.hidden.device.type, enabled=False):
        operands = operands.with_weights_in(head.product_dtype)
        gradients = _Gradients(operands, head, wanted - _PER_TOKEN)
        for tile in _folded_tiles(operands, head, form_error=True):
            gradients.add(tile, token_weight[tile.positions])
    return gradients.tensors()
