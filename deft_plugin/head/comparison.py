"""The check before a head is installed: what a model's own forward does with eight tokens, against what it is taken for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .configuration import numbers_of
from .cpu_weights import cpu_weights_left_unpacked
from .lm_head import lm_head_of, lm_head_rows
from .measurement import PROBE_SHAPE, UnknownForwardError
from .own_forward import OwnForward
from .substitution import in_mode

logger = logging.getLogger("deft_plugin")


def has_weights_in_parts(model: PreTrainedModel) -> bool:
    """Whether ZeRO-3 or tensor parallelism has left parts of the weights here, on every rank alike."""
    return any(isinstance(each, DTensor) or not each.numel() for each in model.parameters())


def compare_on_tokens(
    model: PreTrainedModel,
    forward: Callable[..., Any],
    gated_forward: Callable[..., Any],
    own_forward: OwnForward,
) -> None:
    """Measure the model's own forward on eight tokens, in training and in evaluation mode, and refuse what is unknown.

    A model that wants more than tokens is left to its first gated forward, which measures it with its own batch.

    Args:
        model: whose forward it is.
        forward: its own one, bound.
        gated_forward: the one that is to take its place, bound.
        own_forward: what that one runs the own one with.

    Raises:
        ValueError: its logits or losses are not what the head takes them for.
    """
    ids = ordinary_tokens(model)
    labels = ids.clone()
    labels[-1, -2:] = -100
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "mps")}
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices),
            cpu_weights_left_unpacked(model),
        ):
            for training in (True, False):
                with in_mode(model, training):
                    gated_forward(input_ids=ids, labels=labels)
                    own_forward.examine_own_loss(model, forward, ids, ids)
    except Exception as error:
        if isinstance(error, UnknownForwardError) or own_forward.called_lm_head():
            raise
        logger.debug("%s wants more than tokens: %s", type(model).__name__, error)


def ordinary_tokens(model: PreTrainedModel) -> Tensor:
    """(2, 4) ids that the configuration does not name, as it does an image's or the end's."""
    # A model may have more embeddings than logits, for images, or fewer.
    embeddings: Any = model.get_input_embeddings()
    sizes = (getattr(embeddings, "num_embeddings", None), lm_head_rows(lm_head_of(model)))
    size = min(size for size in sizes if size)
    named = {int(number) for number in numbers_of(model) if float(number).is_integer()}
    count = math.prod(PROBE_SHAPE)
    # From the middle, where ordinary tokens are.
    order = (token for half in (range(size // 2, size), range(size // 2)) for token in half)
    unnamed = (token for token in order if token not in named)
    ids = [token for token, _ in zip(unnamed, range(count), strict=False)] or [0]
    ids = (ids * count)[:count]
    device = next(embeddings.parameters()).device
    return torch.tensor(ids, device=device).reshape(PROBE_SHAPE)
