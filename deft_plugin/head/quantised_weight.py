"""A quantised lm_head's weight as a floating matrix, by the library that quantised it or by the layer's own forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .lm_head import lm_head_device


def is_quantised(layer: Any) -> bool:
    """Whether a linear layer's numbers are another thing than a floating matrix named `weight`."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):  # HQQ's W_q, GPTQ's and AWQ's qweight.
        return hasattr(layer, "in_features") and hasattr(layer, "out_features")
    # Quantised weights are parameters of a class of their own, some with a floating dtype, or 8 bits wide.
    kinds = (nn.Parameter, Tensor, DTensor)
    return type(weight) not in kinds or not weight.is_floating_point() or weight.element_size() < 2


def dequantised(layer: Any, dtype: torch.dtype) -> Tensor:
    """A quantised weight as a floating one (V, H), made anew in each forward pass.

    Args:
        layer: the one that has it.
        dtype: of the layer's input.
    """
    weight: Any = getattr(layer, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        whole: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    elif kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
        whole = int8_vectorwise_dequant(weight.data, scales)
    elif hasattr(layer, "W_q"):
        whole = layer.dequantize()
    elif hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
        try:
            whole = weight.dequantize()
        except NotImplementedError:  # torchao's with activations quantised.
            return _weight_by_forward(layer, dtype)
    else:
        return _weight_by_forward(layer, dtype)
    return whole.detach()


def _weight_by_forward(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight (V, H) of a linear layer of any class: what its own forward makes of each unit vector.

    That costs as much as the logits of H tokens.
    """
    identity = torch.eye(layer.in_features, dtype=dtype, device=lm_head_device(layer))
    # The class's forward: `project_with` may have put another in the place of the instance's.
    columns: Tensor = type(layer).forward(layer, identity)
    bias = getattr(layer, "bias", None)
    return (columns if bias is None else columns - bias).t()
