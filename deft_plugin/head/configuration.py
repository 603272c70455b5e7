"""What a model's configuration says: its parts, and the numbers in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel


def configs_of(model: PreTrainedModel) -> list[Any]:
    """The configuration, and that of the language model in it where it is another."""
    text = model.config.get_text_config()
    return [model.config] if text is model.config else [model.config, text]


def numbers_of(model: PreTrainedModel) -> list[float]:
    """All numbers in the model's configuration and its parts, and on the model itself."""
    numbers: list[float] = []

    def collect(value: Any, depth: int) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            numbers.append(value)
        elif isinstance(value, Mapping) and depth:
            for part in value.values():
                collect(part, depth - 1)
        elif isinstance(value, PretrainedConfig) and depth:
            collect(vars(value), depth - 1)

    collect(model.config, 8)
    collect({name: value for name, value in vars(model).items() if not name.startswith("_")}, 1)
    return numbers
