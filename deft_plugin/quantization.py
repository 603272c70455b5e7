"""A guard for 4-bit models on a CPU."""

from __future__ import annotations

from torch import nn


def keep_cpu_weights_unpacked(model: nn.Module) -> int:
    """Make 4-bit layers on a CPU keep their gradients; return how many layers were set.

    On a CPU with AVX512_BF16, bitsandbytes packs a Linear4bit's weight in the first forward pass without
    gradients (an evaluation, a generation) and then uses the packed form in training too, where the
    gradient of the layer's input is lost: the evaluation silently changes the training. A layer that
    is told not to pack trains alike with and without evaluations. Layers on an accelerator never pack.
    """
    count = 0
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
            count += 1
    return count
