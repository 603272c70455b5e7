"""An lm_head taken apart: which tensors its layer multiplies hidden states with, whatever has been put on it.

A layer is peeled from the outside in: PEFT's `modules_to_save`, a LoRA adapter, trainable tokens, fake
quantisation, a quantised weight, a shard of it. What is left is a `Projection`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .adapters import check_adapter, is_trainable_tokens, with_lora, with_trainable_tokens
from .lm_head import unwrapped
from .projection import Projection
from .quantised_weight import dequantised, is_quantised
from .sharding import deepspeed_shard_of, shard_of
from .substitution import forward_of


def project_with(
    layer: Any, hidden_states: Tensor, function: Callable[[Projection], dict[str, Any]]
) -> dict[str, Any]:
    """`function` of the layer's projection, called while its parameters are whole.

    FSDP and ZeRO-3 gather parameters in hooks around the modules that hold them, and scatter and average
    their gradients: so `function` runs in the place of those modules' forwards. FSDP finds the gradients
    by the tensors in what is returned, a dict.

    Raises:
        ValueError: the layer is more than a linear one, is offloaded, or distributed in an unknown way.
    """

    # Of what the hooks pass on: ZeRO-3 lets go of parameters when its gradient is there.
    def with_all(hidden_states: Tensor) -> dict[str, Any]:
        if isinstance(hidden_states, DTensor):
            raise ValueError(
                "lm_head is tensor parallel and an FSDP module of its own, whose hooks do not go together "
                "with the gated head. Leave lm_head in the model's own FSDP module: do not call "
                "fully_shard on it."
            )
        return function(projection_of(layer, hidden_states))

    run: Callable[[Tensor], dict[str, Any]] = with_all
    for module in _modules_of(layer):
        if has_gathering_hooks(module):
            run = _called_as(module, run)
    return run(hidden_states)


def projection_of(layer: Any, hidden_states: Tensor) -> Projection:
    """The tensors of a layer whose parameters are whole. Differentiable in all that trains.

    Raises:
        ValueError: as `project_with`.
    """
    inner = unwrapped(layer)
    if is_trainable_tokens(inner):
        return with_trainable_tokens(inner, projection_of(inner.base_layer, hidden_states))
    if hasattr(inner, "base_layer"):
        check_adapter(inner)
        return with_lora(inner, projection_of(inner.base_layer, hidden_states), hidden_states)
    quantised = is_quantised(inner)
    weight = dequantised(inner, hidden_states.dtype) if quantised else inner.weight
    if weight.is_meta:
        raise ValueError(
            "The lm_head's weight is offloaded (device_map), and the gated head reads it directly: give "
            "lm_head a device."
        )
    hidden_states = hidden_states.to(weight.device)
    bias = getattr(inner, "bias", None)
    # Quantisation-aware training: torchao rounds on the way in, with a straight-through gradient.
    if getattr(inner, "activation_fake_quantizer", None) is not None:
        hidden_states = inner.activation_fake_quantizer(hidden_states)
    if getattr(inner, "weight_fake_quantizer", None) is not None:
        weight = inner.weight_fake_quantizer(weight)
    if not isinstance(weight, DTensor):
        return Projection(hidden_states, weight, bias, shard=deepspeed_shard_of(inner))
    shard = shard_of(weight)
    bias = bias.to_local() if isinstance(bias, DTensor) else bias
    return Projection(hidden_states, weight.to_local(), bias, shard=shard)


def _modules_of(layer: Any) -> list[nn.Module]:
    """The modules whose parameters are read directly, the layer itself first."""
    inner = unwrapped(layer)
    modules = [layer, inner]
    if is_trainable_tokens(inner):
        modules += [inner.base_layer]
    elif hasattr(inner, "base_layer"):
        modules += [inner.base_layer, *getattr(inner, "lora_B", {}).values()]
    return list(dict.fromkeys(modules))


def has_gathering_hooks(module: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 gathers the module's own parameters around its forward."""
    return isinstance(module, FSDPModule) or hasattr(module, "ds_id")


def _called_as(
    module: nn.Module, function: Callable[[Tensor], dict[str, Any]]
) -> Callable[[Tensor], dict[str, Any]]:
    """`function` as if it were the module's forward, so that hooks on the module run."""

    def call(hidden_states: Tensor) -> dict[str, Any]:
        with forward_of(module, function):
            result: dict[str, Any] = module(hidden_states)
            return result

    return call
