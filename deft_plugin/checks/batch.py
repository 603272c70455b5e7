"""The first batch, with what no data set shows: rows that a collator makes (images), streams, transforms."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .vocabulary import IGNORED, REMEDY, vocabulary_sizes

logger = logging.getLogger("deft_plugin")

_MASK = (
    "It stands for an image or the like, which the model cannot predict: such labels are to be -100, as with "
    "assistant_only_loss=True, or prompt and completion."
)


def check_batch(name: str, batch: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Raise `ValueError` for a batch with ids that the model does not have, and warn of one that trains nothing.

    This also sees what `check_data` cannot: rows that the collator makes (images), streams, transforms.

    Args:
        name: of the data set.
        batch: what the model is given: `input_ids` and `labels` (batch, sequence), or `shift_labels`.
        model: the causal LM.
    """
    labels = "labels" if batch.get("labels") is not None else "shift_labels"
    sizes, placeholders = vocabulary_sizes(model), _placeholders(model)
    for column, size, others in (
        ("input_ids", sizes["input_ids"], placeholders),
        (labels, sizes["labels"], [IGNORED]),
    ):
        ids = batch.get(column)
        if not isinstance(ids, Tensor):
            continue
        wrong = (ids < 0) | (ids >= size)
        wrong &= torch.isin(ids, torch.tensor(others, device=ids.device), invert=True)
        if wrong.any():
            first = int(ids[wrong][0])
            remedy = _MASK if first in placeholders else REMEDY
            raise ValueError(
                f"{name}: the first batch has {int(wrong.sum()):,} {column} outside the model's vocabulary "
                f"[0, {size:,}), the first: {first:,}. {remedy}"
            )
    targets = batch.get("labels")
    # The first token's label is never scored. Without labels, shift_labels are a part of a sequence's.
    if isinstance(targets, Tensor) and not (targets[..., 1:] != IGNORED).any():
        logger.warning(
            "%s: the first batch has no token to train on. Check the labels, the prompt's part of each row and "
            "max_length.",
            name,
        )


def _placeholders(model: PreTrainedModel) -> list[int]:
    """Ids in whose places a multi-modal model puts images and the like; some models have no embedding for them."""
    config = model.config
    if config.get_text_config() is config:
        return []
    return [
        value
        for name, value in vars(config).items()
        if isinstance(value, int)
        and name.endswith(("_token_id", "_token_index"))
        and not name.startswith(("pad_", "bos_", "eos_"))
    ]
