"""PEFT's adapters on an lm_head: what they add to the product of the layer under them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .projection import Projection


def is_trainable_tokens(layer: Any) -> bool:
    """Whether the layer is another one with some rows of its own, PEFT's `trainable_token_indices`."""
    return hasattr(layer, "trainable_tokens_delta")


def check_adapter(layer: Any) -> None:
    """Raise `ValueError` where an adapter adds something else than a low-rank product; trainable tokens apart."""
    kind = type(layer).__name__
    instead = "Remove lm_head from it; to train the head whole, put it into modules_to_save."
    variants = getattr(layer, "lora_variant", {})
    for name in _active_adapters(layer):
        if name in variants:
            variant = type(variants[name]).__name__.removesuffix("Variant").removesuffix("Linear")
            raise ValueError(
                f"The adapter {name!r} on lm_head is {variant}, whose logits are not linear in the hidden "
                f"states with one weight and one low-rank addition: the gated head supports plain LoRA there. {instead}"
            )
    # AdaLoRA's are parameters, with singular values between them.
    is_lora = isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)
    if not is_lora or type(layer).__name__ == "ParamWrapper":
        raise ValueError(
            f"The adapter on lm_head is a {kind} of {type(layer).__module__}: the gated head supports LoRA, "
            f"trainable tokens and modules_to_save there. {instead}"
        )


def with_lora(layer: Any, base: Projection, hidden_states: Tensor) -> Projection:
    """logits = h W^T + s dropout(h) A^T B^T: several adapters lie side by side in A and B.

    Args:
        layer: PEFT's, which `check_adapter` lets pass.
        base: the projection of the layer under it.
        hidden_states: (..., H), the layer's input.
    """
    bias, parts = base.bias, []
    for name in _active_adapters(layer):
        down, up = layer.lora_A[name], layer.lora_B[name]
        hidden = hidden_states.to(down.weight.device, down.weight.dtype)
        hidden = down(layer.lora_dropout[name](hidden)) * layer.scaling[name]
        parts.append((hidden, up.weight))
        if up.bias is not None:
            added = up.bias * layer.scaling[name]
            bias = added if bias is None else bias + added.to(bias.dtype)
    if not parts:
        return base
    if base.shard is not None:
        raise ValueError(
            "lm_head is tensor parallel and has a LoRA adapter, which the gated head does not support together: "
            "leave lm_head out of one of them."
        )
    hiddens, weights = zip(*parts, strict=True)
    return replace(base, bias=bias, low_rank=(torch.cat(hiddens, -1), torch.cat(weights, 1)))


def with_trainable_tokens(layer: Any, base: Projection) -> Projection:
    """Rows of the weight replaced: an addition of as many columns, h (new - old)^T, each one token's.

    The weight stays as it is: neither a copy of it with other rows nor its gradient is built.

    Args:
        layer: PEFT's.
        base: the projection of the layer under it.
    """
    # PEFT's own forward leaves the bias out with the tokens in, and has it without.
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return base
    weight = base.weight
    indices = [index for name in layer.active_adapters for index in layer.token_indices[name]]
    rows = torch.tensor(indices, device=weight.device)
    new = torch.cat([layer.trainable_tokens_delta[name] for name in layer.active_adapters])
    change = new.to(weight) - weight[rows]
    columns = weight.new_zeros(weight.size(0), len(indices))
    columns[rows, torch.arange(len(indices), device=weight.device)] = 1
    hidden = functional.linear(base.hidden_states.to(weight.dtype), change)
    return replace(base, bias=None, low_rank=(hidden, columns))


def _active_adapters(layer: Any) -> list[str]:
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in getattr(layer, "lora_A", {})]
