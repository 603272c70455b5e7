"""The LoRA adapter that the scripts train."""

from __future__ import annotations

from peft import LoraConfig
from torch import nn


def lora_config(rank: int) -> LoraConfig:
    """On all linear layers but lm_head, with alpha twice the rank."""
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def in_float32(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, made float32.

    TRL rounds the adapters of a 4-bit model to bf16, where the small steps of a schedule's end are lost, and an adapter
    that is loaded again computes in float32.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return trainable
