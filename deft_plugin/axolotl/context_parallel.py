"""Context parallelism: a hook of Axolotl's cuts the sequences of each batch into parts, one a rank, before the forward.

Labels are shifted before the cut: after it, the last token of a part has none. And Axolotl, which counts the
step's tokens anew from each micro-batch, is not shown the exact number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn import functional

_IGNORED = -100
_LARGEST_DIVISOR = 64


@contextmanager
def with_shifted_labels(model: nn.Module, parts: int) -> Iterator[None]:
    """Have the model called with labels that were shifted before its sequences were cut.

    Args:
        model: on which Axolotl has registered its hook already.
        parts: number of ranks that share a sequence.
    """
    # What Axolotl pads the other tensors to a multiple of.
    divisor = min(parts, _LARGEST_DIVISOR)
    kept: dict[str, Any] = {}

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        labels = kwargs.pop("labels", None)
        kept.clear()
        if labels is not None:
            if "num_items_in_batch" in kwargs:
                kept["num_items_in_batch"] = kwargs.pop("num_items_in_batch")
            padding = 1 + -labels.size(1) % divisor
            kwargs["shift_labels"] = functional.pad(labels[:, 1:], (0, padding), value=_IGNORED)
        return args, kwargs

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, **kept}

    handles = (
        model.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        model.register_forward_pre_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
