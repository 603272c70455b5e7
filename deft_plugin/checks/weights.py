"""The model's weights, and whether it has what an adapter is to train beside itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Of adapters, which may name none.
_TASKS = (None, "CAUSAL_LM")


def check_weights(model: nn.Module) -> None:
    """Raise `ValueError` where a weight of the model is NaN.

    What is quantised, sharded, partitioned away or on no device yet is not read.
    """
    for name, parameter in model.named_parameters():
        # Quantised weights are of a class of their own, some of them with a floating dtype, or 8 bits wide.
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            continue
        if parameter.element_size() < 2 or parameter.is_meta or not parameter.numel():
            continue
        # The smallest of numbers with a NaN among them is NaN, at the price of one read.
        if torch.aminmax(parameter.detach()).min.isnan():
            count = int(parameter.isnan().sum())
            raise ValueError(
                f"The weight {name} has {count:,} NaN of {parameter.numel():,} numbers: the checkpoint is "
                "damaged or was saved after training diverged. Training on it would change nothing."
            )


def check_modules_to_save(model: nn.Module) -> None:
    """Raise `ValueError` where an adapter's `modules_to_save` names what the model does not have, which PEFT passes over."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return
    # As PEFT looks for them.
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for config in configs.values():
        given = getattr(config, "modules_to_save", None)
        # For other tasks PEFT adds names of its own.
        if not isinstance(given, list | tuple | set) or config.task_type not in _TASKS:
            continue
        missing = [each for each in given if not any(name.endswith(each) for name in names)]
        if getattr(config, "trainable_token_indices", None):
            # TRL adds it for the tokens of a chat template.
            missing = [name for name in missing if name != "lm_head"]
        if missing:
            raise ValueError(
                f"modules_to_save={list(given)!r}: the model has no {', '.join(missing)}, which would be left out without a "
                f"word. It has {', '.join(_names_of_layers(model))}."
            )


def _names_of_layers(model: nn.Module) -> list[str]:
    """What the layers with weights are called, PEFT's own left out."""
    named = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
        and not any(own in name for own in ("lora_", "base_layer", "original_module", "_to_save"))
    }
    return sorted(name for name in named if not name.isdecimal())
