"""4-bit weights on a CPU: kept from being packed for inference, by which training would lose gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def keep_cpu_weights_unpacked(model: nn.Module) -> int:
    """Make 4-bit layers on a CPU keep their gradients; return how many layers were set.

    On a CPU with AVX512_BF16, bitsandbytes packs a Linear4bit's weight in the first forward pass without
    gradients (an evaluation, a generation) and then uses the packed form in training too, where the
    gradient of the layer's input is lost: the evaluation silently changes the training. So do GPT-QModel's
    layers for a CPU or an Intel XPU with GPTQ and AWQ weights. A layer that is told not to pack trains
    alike with and without evaluations. Layers on other accelerators never pack.

    Raises:
        ValueError: a layer is packed already. bitsandbytes 0.50 cannot undo that: it leaves the scales of
            the weights transposed unless they are doubly quantised, and rounded to bfloat16 if they are.
    """
    layers = _packing_layers(model)
    for layer in layers:
        if _is_packed(layer):
            raise ValueError(
                "The model's 4-bit weights have been packed for inference on this CPU by an evaluation or a "
                "generation, and would lose gradients in training. Load the model again and call "
                "deft_plugin.keep_cpu_weights_unpacked(model) before you first use it."
            )
        setattr(layer, *_unpacked(layer))
    return len(layers)


@contextmanager
def cpu_weights_left_unpacked(model: nn.Module) -> Iterator[None]:
    """Keep a forward pass without gradients from packing 4-bit weights on a CPU."""
    before = []
    for layer in _packing_layers(model):
        if _is_packed(layer):
            continue
        name, unpacked = _unpacked(layer)
        before.append((layer, name, getattr(layer, name)))
        setattr(layer, name, unpacked)
    try:
        yield
    finally:
        for layer, name, value in before:
            setattr(layer, name, value)


def _packing_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, _unpacked(module)[0])]


def _unpacked(layer: Any) -> tuple[str, Any]:
    """The attribute that lets a layer pack its weight, and its value where the layer must not."""
    if hasattr(layer, "qweight"):
        return "linear_mode", "train"  # GPT-QModel; None until the first forward decides.
    return "support_avx512bf16_for_cpu", False  # bitsandbytes


def _is_packed(layer: Any) -> bool:
    if hasattr(layer, "linear_mode"):
        return bool(layer.linear_mode == "inference")
    quant_state = getattr(layer.weight, "quant_state", None)
    return bool(getattr(quant_state, "packing_format_for_cpu", False))
