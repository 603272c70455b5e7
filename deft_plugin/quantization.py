"""A guard for 4-bit models on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def keep_cpu_weights_unpacked(model: nn.Module) -> int:
    """Make 4-bit layers on a CPU keep their gradients; return how many layers were set.

    On a CPU with AVX512_BF16, bitsandbytes packs a Linear4bit's weight in the first forward pass without
    gradients (an evaluation, a generation) and then uses the packed form in training too, where the
    gradient of the layer's input is lost: the evaluation silently changes the training. A layer that
    is told not to pack trains alike with and without evaluations. Layers on an accelerator never pack.

    Raises:
        ValueError: a layer is packed already. bitsandbytes 0.50 cannot undo that: it leaves the scales of
            the weights transposed unless they are doubly quantised, and rounded to bfloat16 if they are.
    """
    layers = _packing_layers(model)
    for layer in layers:
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                "The model's 4-bit weights have been packed for inference on this CPU by an evaluation or a "
                "generation, and would lose gradients in training. Load the model again and call "
                "deft_plugin.quantization.keep_cpu_weights_unpacked(model) before you first use it."
            )
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


@contextmanager
def cpu_weights_left_unpacked(model: nn.Module) -> Iterator[None]:
    """Keep a forward pass without gradients from packing 4-bit weights on a CPU."""
    layers = {layer: layer.support_avx512bf16_for_cpu for layer in _packing_layers(model)}
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for layer, packs in layers.items():
            layer.support_avx512bf16_for_cpu = packs


def _packing_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
