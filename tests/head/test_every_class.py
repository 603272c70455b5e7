"""Every causal LM and every multi-modal language model of the installed transformers.

The smallest random model of each class gives the same loss and gradients with the gated head as without; or it
is refused, for a reason that a table names. A class that is new in a later transformers is expected to be equal.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

from deft_plugin import add_gated_head, build_objective, gated_head_of, gated_loss

from .media import media_batch, takes_media, text_batch
from .oracle import Batch
from .smallest import small_config, small_model

# (model_type, class), each once.
CLASSES = list(
    dict.fromkeys(
        (model_type, name)
        for mapping in (
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            # Image-text-to-text, and the audio language models.
            modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        )
        for model_type, names in mapping.items()
        for name in ([names] if isinstance(names, str) else names)
    )
)


def smallest(model_type: str, class_name: str) -> tuple[PreTrainedModel, Batch]:
    """A class's smallest model and a batch for it."""
    model_class = getattr(transformers, class_name)
    model = small_model(model_class, small_config(model_type, model_class))
    return model, media_batch(model) if takes_media(model) else text_batch(model)


def floating(batch: Batch) -> dict[str, Tensor]:
    """Images and audio."""
    return {name: value for name, value in batch.items() if value.is_floating_point()}


def gradients_of(model: PreTrainedModel, batch: Batch, loss: Tensor) -> dict[str, Tensor]:
    """By all parameters and by the images or audio."""
    inputs = {**dict(model.named_parameters()), **floating(batch)}
    inputs = {name: value for name, value in inputs.items() if value.requires_grad}
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(inputs.items(), found, strict=True)
    }


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Relative to each one's largest gradient, where that is more than rounding of the largest of all."""
    assert found.keys() == expected.keys()
    noise = 1e-4 * max(value.abs().max().item() for value in expected.values() if value.numel())
    return max(
        (
            (found[n] - expected[n]).abs().max().item()
            / max(expected[n].abs().max().item(), noise),
            n,
        )
        for n in expected
        if expected[n].numel()
    )
