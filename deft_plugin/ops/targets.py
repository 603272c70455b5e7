"""Which targets count: checked, and counted without making the device's queue wait for the host.

The host has to know how many targets are valid before it can size a tile. Reading that number waits for everything
that was put on the device's queue before it; so whoever has the targets before the backbone runs starts the count there
(`CountedTargets`), and reads it when it has long arrived.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CountedTargets:
    """Targets whose count is on its way to the host; `linear_gated_loss` takes them in place of targets.

    Args:
        targets: any shape, integers; they may not change until they are used.
        ignore_index: target value of positions that do not count.
        mask: bool, the targets' shape; which are valid.
        figures: (3,) int64: the number of valid targets, the smallest and the largest of them, 0 among these where
            some are not valid.
        arrival: of the figures; None where they are there.
    """

    targets: Tensor
    ignore_index: int
    mask: Tensor
    figures: Tensor
    arrival: Any = None

    @classmethod
    def start(cls, targets: Tensor, ignore_index: int = -100) -> CountedTargets:
        """Count, without waiting.

        Raises:
            ValueError: targets or ignore_index are no integers.
        """
        targets, ignore_index = as_integers(targets, ignore_index)
        mask = targets != ignore_index
        valid = torch.where(mask, targets, 0) if targets.numel() else targets.new_zeros(1)
        figures = torch.stack((mask.sum(), valid.min(), valid.max()))
        if targets.device.type in ("cpu", "mps"):
            return cls(targets, ignore_index, mask, figures)
        figures = figures.to("cpu", non_blocking=True)
        arrival = torch.get_device_module(targets.device).Event()
        with torch.get_device_module(targets.device).device(targets.device):
            arrival.record()
        return cls(targets, ignore_index, mask, figures, arrival)

    def to(self, device: torch.device) -> CountedTargets:
        """The same targets on another device."""
        return replace(self, targets=self.targets.to(device), mask=self.mask.to(device))

    def read(self) -> tuple[int, int, int]:
        """`figures`, on the host."""
        if self.arrival is not None:
            self.arrival.synchronize()
        count, smallest, largest = self.figures.tolist()
        return count, smallest, largest


def as_integers(targets: Any, ignore_index: Any, name: str = "targets") -> tuple[Tensor, int]:
    """Targets in int64, since a byte cannot be compared with -100, and ignore_index.

    Raises:
        ValueError: they are no integers of 64 bits; the message says so of `name`.
    """
    if not isinstance(targets, Tensor):
        raise ValueError(f"{name} must be a tensor of integers, not {type(targets).__name__}.")
    is_integer = isinstance(ignore_index, Integral) and not isinstance(ignore_index, bool)
    if not is_integer or not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is {ignore_index!r}; it must be an integer of 64 bits.")
    # Those of uint64 do not fit int64.
    no_integers = targets.is_floating_point() or targets.is_complex()
    if no_integers or targets.dtype in (torch.bool, torch.uint64):
        raise ValueError(f"{name} must be integers; their dtype is {targets.dtype}.")
    return targets.long(), int(ignore_index)


@dataclass(frozen=True)
class ValidTargets:
    """The targets that count.

    Args:
        mask: bool, the targets' shape.
        rows: (n,) int64 positions of the valid targets in flattened order; None when all are valid.
        targets: (n,) int64, in [0, V).
    """

    mask: Tensor
    rows: Tensor | None
    targets: Tensor

    @classmethod
    def check(
        cls, given: Tensor | CountedTargets, vocab_size: int, ignore_index: int
    ) -> ValidTargets:
        """Find the valid targets; one host synchronisation on an accelerator, unless they are counted.

        Raises:
            ValueError: a target is neither `ignore_index` nor in [0, vocab_size), or is no integer; targets that
                were counted with another ignore_index.
        """
        counted = (
            given
            if isinstance(given, CountedTargets)
            else CountedTargets.start(given, ignore_index)
        )
        ignore_index = int(ignore_index)
        if counted.ignore_index != ignore_index:
            raise ValueError(
                f"ignore_index is {ignore_index}, and the targets were counted with {counted.ignore_index}."
            )
        targets, mask = counted.targets, counted.mask
        valid_count, smallest, largest = counted.read()
        if smallest < 0 or largest >= vocab_size:
            outside = mask & ((targets < 0) | (targets >= vocab_size))
            raise ValueError(
                f"{int(outside.sum())} of {valid_count} targets are outside the vocabulary "
                f"[0, {vocab_size}), the first being {targets[outside][0].item()}. Do tokenizer and "
                f"model match? A position to be skipped must hold ignore_index={ignore_index}."
            )
        flat = targets.reshape(-1)
        if valid_count == flat.numel():
            return cls(mask, None, flat)
        rows = torch.nonzero_static(mask.reshape(-1), size=valid_count).squeeze(1)
        return cls(mask, rows, flat[rows])

    def spread(self, values: Tensor) -> Tensor:
        """(n,) values of valid tokens, in the targets' shape with zeros elsewhere."""
        if self.rows is None:
            return values.view(self.mask.shape)
        flat = values.new_zeros(self.mask.numel())
        return flat.index_put((self.rows,), values).view(self.mask.shape)


def described(targets: Any) -> str:
    """What `targets` are, for a message."""
    if isinstance(targets, Tensor):
        return f"of shape {tuple(targets.shape)}"
    return f"a {type(targets).__name__}"
