"""What hidden states are scored on: labels as a model is given them, and the targets that they mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..ops import CountedTargets
from ..ops.targets import as_integers


@dataclass(frozen=True)
class Labels:
    """What hidden states (batch, sequence, H) are scored on.

    Args:
        labels: (batch, sequence), the next position's; or
        shift_labels: (batch, sequence), each position's own.
        ignore_index: of positions that do not count.
    """

    labels: Tensor | None
    shift_labels: Tensor | None
    ignore_index: int

    @property
    def given(self) -> Tensor:
        """Either of the two."""
        tensor = self.labels if self.shift_labels is None else self.shift_labels
        assert tensor is not None
        return tensor

    def without_masked(self, mask: Any) -> Labels:
        """Those whose own position has no 0 in `mask`; all where that is no tensor of the labels' shape."""
        if self.labels is None or not isinstance(mask, Tensor) or mask.shape != self.labels.shape:
            return self
        return replace(self, labels=self.labels.masked_fill(mask == 0, self.ignore_index))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def counted_targets(labels: Labels) -> CountedTargets:
    """(batch, sequence) targets, each position's own."""
    name = "labels" if labels.shift_labels is None else "shift_labels"
    targets, ignore_index = as_integers(labels.given, labels.ignore_index, name)
    if targets.dim() < 2:
        raise ValueError(
            f"{name} must be (batch, sequence); their shape is {tuple(targets.shape)}."
        )
    if labels.shift_labels is None:
        # Shifting the labels, not the hidden states, avoids a copy of these and one of their gradient.
        targets = functional.pad(targets[..., 1:], (0, 1), value=ignore_index)
    return CountedTargets.start(targets, ignore_index)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def version_of(tensor: Tensor) -> Any:
    """What changes when the tensor is written to; in inference mode, where that is not known, always."""
    return object() if tensor.is_inference() else tensor._version
