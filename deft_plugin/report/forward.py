"""A forward pass for its logits: the arguments that a model takes, and what is said where it fails."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..head import causal_lm_of
from .context import positions_made_for


def parameters_of(model: PreTrainedModel) -> set[str]:
    """Names of what the causal LM's forward takes."""
    return {*inspect.signature(causal_lm_of(model).forward).parameters}


def logits_of(
    model: PreTrainedModel, ids: Tensor, attention_mask: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Logits of the positions `kept`, or of all.

    Args:
        model: a causal LM of transformers, or a PEFT model of one.
        ids: (b, n) int64.
        attention_mask: (b, n), 0 where a row is padded.
        kept: (k,) int64.

    Returns:
        (b, k, V).

    Raises:
        ValueError: the forward fails on rows of this length.
    """
    device = model.get_input_embeddings().weight.device
    parameters = parameters_of(model)
    arguments: dict[str, Any] = {"input_ids": ids.to(device)}
    # xLSTM takes none: what is padded comes after all else.
    if "attention_mask" in parameters:
        arguments["attention_mask"] = attention_mask.to(device)
    if "use_cache" in parameters:
        arguments["use_cache"] = False
    kept = None if kept is None else kept.to(device)
    is_kept = "logits_to_keep" in parameters and kept is not None
    if is_kept:
        arguments["logits_to_keep"] = kept
    try:
        logits: Tensor = model(**arguments).logits
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:
        length = ids.size(1)
        most = positions_made_for(model)
        limit = (
            f", more than the {most:,} of its max_position_embeddings (--max-length {most})"
            if most is not None and length > most
            else ""
        )
        raise ValueError(
            f"the model fails on rows of {length:,} tokens{limit}: {textwrap.shorten(str(error), 200)}"
        ) from error
    return logits if kept is None or is_kept else logits[:, kept]
