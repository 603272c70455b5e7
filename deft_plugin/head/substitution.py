"""Something else in a place for a while: a module's forward, a child module, an attribute, a mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_MISSING = object()


@contextmanager
def attribute_of(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Have `value` in the instance's own `name`, and give back what was or was not there."""
    present = owner.__dict__.get(name, _MISSING)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if present is _MISSING:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = present


def forward_of(module: nn.Module, function: Callable[..., Any]) -> Any:
    """Have `function` in place of the module's forward."""
    return attribute_of(module, "forward", function)


@contextmanager
def child_of(parent: nn.Module, name: str, child: nn.Module) -> Iterator[None]:
    """Have `child` in place of the parent's child of that name."""
    present = parent._modules[name]
    parent._modules[name] = child
    try:
        yield
    finally:
        parent._modules[name] = present


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Have the module and all in it in training or evaluation mode, then each in its own again."""
    modes = {part: part.training for part in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
