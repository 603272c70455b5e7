"""The layer that makes a model's logits: which one it is, how many it makes, and where."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .sharding import deepspeed_shard_of


def lm_head_of(model: PreTrainedModel) -> Any:
    """The layer that makes logits: the model's own, or that of its `language_model`; None without one."""
    layer = model.get_output_embeddings()
    part = getattr(model, "language_model", None)
    if layer is None and isinstance(part, PreTrainedModel):
        return part.get_output_embeddings()
    return layer


def unwrapped(layer: Any) -> Any:
    """The layer that runs, out of PEFT's `modules_to_save` and `trainable_token_indices`."""
    if hasattr(layer, "token_adapter"):
        return layer.token_adapter
    if not hasattr(layer, "modules_to_save"):
        return layer
    name = layer.active_adapters[0] if layer.active_adapters else None
    if layer.disable_adapters or name not in layer.modules_to_save:
        return layer.original_module
    return layer.modules_to_save[name]


def innermost(layer: Any) -> Any:
    """The layer under all adapters, which has the weight."""
    inner = unwrapped(layer)
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    return inner


def lm_head_rows(layer: Any) -> int:
    """How many tokens the vocabulary has; an attribute where ZeRO-3 leaves no weight to measure, or it is packed."""
    inner = innermost(layer)
    shard = deepspeed_shard_of(inner)
    if shard is not None:
        return shard.vocab_size
    # Not `inner.weight`, at which ZeRO-3 would gather it for as long as the layers run.
    weight: Any = inner._parameters.get("weight")
    if type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1:
        # PEFT's copy of a tied lm_head has its two sizes in the wrong places. Under ZeRO-3 no number is left.
        shape = getattr(weight, "ds_shape", weight.shape)
        if len(shape) == 2 and shape[0]:
            return int(shape[0])
    return int(getattr(inner, "out_features", 0) or inner.weight.size(0))


def lm_head_width(layer: Any) -> int:
    """How many logits the layer gives on this rank."""
    inner = innermost(layer)
    shard = deepspeed_shard_of(inner)
    return lm_head_rows(layer) if shard is None or inner.gather_output else shard.size


def lm_head_device(layer: Any) -> torch.device:
    """Where the layer's logits come to be; the CPU for what is offloaded."""
    inner = innermost(layer)
    # GPTQ's and AWQ's layers have buffers only.
    tensors = (*inner.parameters(), *inner.buffers())
    devices = (tensor.device for tensor in tensors if not tensor.is_meta)
    return next(devices, torch.device("cpu"))
