"""`linear_gated_loss`: the loss of hidden @ weight.T, without the logits."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from ..objectives import Objective, build_objective
from .availability import refuse_where_quack_cannot, resolve_path
from .output import GatedLoss, Reduction, assemble, check_reduction
from .plan import Plan, buffer_dtype
from .projection import LogitsTransform, Operands, product_dtype, project
from .reference import reference_token_loss
from .settings import CoreSettings, Path, TiledPath
from .shard import VocabularyShard
from .sums import StatisticsRequest
from .targets import CountedTargets, ValidTargets, described
from .tiles import default_tile_rows
from .token_loss import tiled_token_loss


def linear_gated_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | CountedTargets,
    objective: str | Objective = "deft",
    *,
    parameters: Mapping[str, Any] | None = None,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    with_entropy: bool = False,
    path: Path = "auto",
    tile_rows: int | None = None,
    skip_below: float = 0.0,
    shard: VocabularyShard | None = None,
) -> GatedLoss:
    """An objective's loss over a language model's lm_head, computed without the (N, V) logits.

    The logits are z = softcap(logit_scale * (hidden @ weight.T + low_rank_hidden @ low_rank_weight.T + bias)).
    Only rows with a valid target are projected, a tile at a time, and gradients are formed in the same pass.
    Statistics are float32 (float64 for float64 input) whatever the dtype of the products, which is
    the autocast dtype under autocast.

    Args:
        hidden: (..., H) hidden states, floating.
        weight: (V, H) lm_head weight; its gradient is formed only if it requires one.
        targets: hidden's shape without H; integers in [0, V), or `ignore_index`. Not shifted here. On an accelerator
            the host waits for their number, unless it was started beforehand: `CountedTargets.start(targets)`.
        objective: a registered name or an `Objective`.
        parameters: the named objective's parameters.
        bias: (V,) or None.
        low_rank: low_rank_hidden, hidden's shape with r for H, and low_rank_weight (V, r), both floating; or
            None. LoRA is (scaling * lora_A(dropout(hidden)), lora_B.weight), and several adapters lie side
            by side along r. Multiplied in the dtype of hidden @ weight.T. Either of the pair may be frozen, and
            no gradient of the weight's size is built for them.
        logit_scale: factor on the logits.
        softcap: c of c * tanh(z / c), or None.
        ignore_index: target value of positions that do not count.
        reduction: "mean" over valid tokens, or "sum".
        num_items_in_batch: divide the sum by this instead: the number of valid tokens of the whole
            optimizer step on all ranks.
        with_entropy: also return the Shannon entropy of every valid token.
        path: "triton" (a GPU, or TRITON_INTERPRET=1), "chunked" (PyTorch, any device), "reference" (full
            logits and autograd; slow), or "auto": Triton on a GPU where it can be had, else chunked. "quack", never
            chosen by "auto", forms exponentials in the product itself: Hopper and Blackwell, bfloat16, with the
            extra `quack` installed; no bias, low rank, logit_scale, softcap or top-k entropy; V a multiple
            of 128 and H of 8, weight contiguous.
        tile_rows: tokens per tile. None chooses tiles of about equal size whose logits fit a buffer of
            64 MiB on a CPU, 128 MiB with `skip_below`, and 1 GiB elsewhere, there of at most 1,024 tokens where the
            weight is frozen and nothing is skipped.
        skip_below: the share of a tile's gradient in its logits, gates included and in the L1 norm, that the
            gradients' products may lose, upstream gradients being equal: the vocabulary entries and tokens that
            hold the least are left out, up to this share, and the result's `skipped` says how many. 0, the default,
            leaves none out. 2**-9 loses less than bfloat16 logits do. What comes of it: docs/skipping.md. Not for
            paths "quack" and "reference".
        shard: weight, bias and low_rank_weight are this rank's rows of an lm_head sharded over ranks (tensor
            parallelism), while hidden, low_rank_hidden and targets are the same on all of them. Collective, in the
            forward pass and, where upstream gradients differ between tokens, in the backward pass; loss
            and the hidden states' gradients are those of the whole, on every rank. Runs on path
            "chunked", which "auto" then means.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a target out of range, an unknown objective,
            parameter, path or reduction; path "triton" or "quack" where it cannot run; a shard on another path than
            "chunked", or one of another size than the weight.

    Source: arXiv 2602.11424; the gate-times-error form of the gradient is in `deft_plugin.objectives`.
    """
    objective = build_objective(objective, parameters)
    transform = LogitsTransform(
        _number("logit_scale", logit_scale),
        None if softcap is None else _number("softcap", softcap),
    )
    check_reduction(reduction, num_items_in_batch)
    if shard is not None and not isinstance(shard, VocabularyShard):
        raise ValueError(f"shard must be a VocabularyShard or None; it is {shard!r}.")
    _check_shapes(
        hidden,
        weight,
        targets.targets if isinstance(targets, CountedTargets) else targets,
        bias,
        shard,
    )
    _check_low_rank(low_rank, hidden, weight)
    CoreSettings(path, tile_rows, skip_below)  # Raises for what no call could have.
    if shard is not None:
        if path not in ("auto", "chunked"):
            raise ValueError(
                f"path={path!r} cannot run on a sharded vocabulary. Choices: 'auto', 'chunked'."
            )
        path = "chunked"
    vocab_size = weight.size(0) if shard is None else shard.vocab_size
    valid = ValidTargets.check(targets, vocab_size, ignore_index)
    request = StatisticsRequest.of(objective, with_entropy)
    operands = Operands(hidden.reshape(-1, hidden.size(-1)), weight, bias)
    if low_rank is not None:
        low_rank_hidden, low_rank_weight = low_rank
        operands = operands._replace(
            low_rank_hidden=low_rank_hidden.reshape(-1, low_rank_hidden.size(-1)),
            low_rank_weight=low_rank_weight,
        )
    if path == "reference":
        logits = project(operands, valid.rows, transform)
        token_loss, statistics = reference_token_loss(logits, valid.targets, objective, request)
        total, gate, skipped = token_loss.sum(), objective.gate(statistics), None
    else:
        dtype = product_dtype(hidden, weight)
        if path == "quack":
            refuse_where_quack_cannot(operands, transform, request, dtype)
            tiled_path: TiledPath = path
        else:
            tiled_path = cast(TiledPath, resolve_path(path, hidden.device))
        trainable = torch.is_grad_enabled() and weight.requires_grad
        plan = Plan(
            objective=objective,
            transform=transform,
            request=request,
            targets=valid.targets,
            rows=valid.rows,
            vocab_size=vocab_size,
            product_dtype=dtype,
            tile_rows=tile_rows
            or default_tile_rows(
                valid.targets.numel(),
                weight.size(0) if shard is None else shard.largest_size,
                buffer_dtype(dtype, tiled_path),
                hidden.device,
                trainable,
                skipping=skip_below > 0,
            ),
            path=tiled_path,
            skip_below=skip_below,
            shard=shard,
        )
        total, token_loss, statistics, gate, skipped = tiled_token_loss(operands, plan)
    return assemble(
        objective,
        valid,
        total,
        token_loss,
        statistics,
        gate,
        skipped,
        with_entropy=with_entropy,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
    )


def _number(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be a number.")
    return float(value)


def _check_shapes(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    shard: VocabularyShard | None,
) -> None:
    if (
        hidden.dim() < 1
        or weight.dim() != 2
        or hidden.size(-1) != weight.size(1)
        or not weight.size(1)
        or (not weight.size(0) and shard is None)
    ):
        raise ValueError(
            f"hidden must be (..., H) and weight (V, H); their shapes are {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}. V and H must be at least 1."
        )
    if not isinstance(targets, Tensor) or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have hidden's shape without its last dimension, "
            f"{tuple(hidden.shape[:-1])}; they are {described(targets)}."
        )
    if shard is not None and weight.size(0) != shard.size:
        raise ValueError(
            f"weight has {weight.size(0)} rows, and this rank's part of a vocabulary of {shard.vocab_size} is "
            f"{shard.size}, from {shard.first} on, as torch.chunk deals it out."
        )
    if bias is not None and not isinstance(bias, Tensor):
        raise ValueError(f"bias must be a tensor or None; it is a {type(bias).__name__}.")
    if bias is not None and bias.device != weight.device:
        raise ValueError(
            f"bias must be on weight's device, {weight.device}; it is on {bias.device}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have shape ({weight.size(0)},); its shape is {tuple(bias.shape)}."
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"hidden and weight must be floating; their dtypes are {hidden.dtype} and "
            f"{weight.dtype}. A quantised lm_head is not supported: keep lm_head out of quantisation."
        )


def _check_low_rank(low_rank: tuple[Tensor, Tensor] | None, hidden: Tensor, weight: Tensor) -> None:
    if low_rank is None:
        return
    if not (
        isinstance(low_rank, (tuple, list))
        and len(low_rank) == 2
        and all(isinstance(tensor, Tensor) for tensor in low_rank)
    ):
        raise ValueError(
            "low_rank must be a pair of tensors (low_rank_hidden, low_rank_weight), or None; it is a "
            f"{type(low_rank).__name__}."
        )
    low_rank_hidden, low_rank_weight = low_rank
    if (
        low_rank_weight.dim() != 2
        or low_rank_weight.size(0) != weight.size(0)
        or not low_rank_weight.size(1)
    ):
        raise ValueError(
            f"low_rank_weight must be (V, r), V being weight's {weight.size(0)} and r at least 1; its shape is "
            f"{tuple(low_rank_weight.shape)}."
        )
    expected = (*hidden.shape[:-1], low_rank_weight.size(1))
    if low_rank_hidden.shape != expected:
        raise ValueError(
            f"low_rank_hidden must have hidden's shape with low_rank_weight's r for H, {expected}; its shape is "
            f"{tuple(low_rank_hidden.shape)}."
        )
    for name, tensor in zip(("low_rank_hidden", "low_rank_weight"), low_rank, strict=True):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating; its dtype is {tensor.dtype}.")
        if tensor.device != weight.device:
            raise ValueError(
                f"{name} must be on weight's device, {weight.device}; it is on {tensor.device}."
            )
