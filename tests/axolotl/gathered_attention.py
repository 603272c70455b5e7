"""Attention for sequences cut over ranks, without a GPU: keys and values of all parts are gathered.

It is to take the place of ring attention, whose package Axolotl wants for context parallelism: both give each part's
queries what comes before them in the whole sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from axolotl.monkeypatch.ring_attn import get_ring_attn_group
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional
from transformers import AttentionInterface

NAME = "gathered"


def gathered_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention; query (batch, heads, part, width), key and value of this rank's part too."""
    try:
        group = get_ring_attn_group()
    except RuntimeError:
        group = None  # Axolotl has not begun to train yet, and cuts nothing.
    start = 0
    if group is not None:
        start = torch.distributed.get_rank(group) * query.size(2)
        # A copy, since gloo takes contiguous tensors alone.
        key, value = (
            torch.cat(all_gather(part.contiguous(), group), 2)  # type: ignore[no-untyped-call]
            for part in (key, value)
        )
    rows = torch.arange(start, start + query.size(2))[:, None]
    visible = rows >= torch.arange(key.size(2))
    output = functional.scaled_dot_product_attention(
        query, key, value, visible, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make it an `attn_implementation` of transformers."""
    AttentionInterface.register(NAME, gathered_attention)
