"""TRL's own classes with objectives: `deft_plugin.register()`."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import trl

from .config import extend_config_class, objective_of
from .trainer import GatedSFTMixin, arguments_of, initialise

_undo: list[Callable[[], None]] = []


def register() -> None:
    """Let TRL's own SFTConfig and SFTTrainer take the objectives' names as `loss_type`.

    The classes are extended in place, so it does not matter whether they were imported before. "nll" and
    "dft" stay TRL's own losses. Calling it again changes nothing; `unregister` undoes it.
    """
    if not _undo:
        _undo.append(extend_config_class(trl.SFTConfig))
        _undo.append(_extend_trainer_class(trl.SFTTrainer))


def unregister() -> None:
    """Undo `register`. Trainers that were made before go on as they are."""
    while _undo:
        _undo.pop()()


def _extend_trainer_class(cls: type) -> Callable[[], None]:
    """Let `cls`, an SFTTrainer class, train with objectives, in place. Returns a function that undoes it.

    It is patched, not subclassed, because scripts and subclasses hold it already. Of its methods that is `__init__`
    alone: it gives a trainer with an objective the class that it would have, had they held one with `GatedSFTMixin`.
    """
    original: Any = cls.__init__  # type: ignore[misc]
    own = vars(cls).get("__init__")

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(self, GatedSFTMixin):
            # deft_plugin.trl.SFTTrainer, whose own __init__ has called this one.
            original(self, *args, **kwargs)
            return
        if objective_of(arguments_of(cls, args, kwargs).get("args")) is not None:
            self.__class__ = _gated_class(type(self), cls)  # type: ignore[arg-type]
        initialise(self, cls, functools.partial(original, self), args, kwargs)

    cls.__init__ = __init__  # type: ignore[misc]

    def undo() -> None:
        if own is None:
            del cls.__init__  # type: ignore[misc]
        else:
            cls.__init__ = own  # type: ignore[misc]

    return undo


@functools.cache
def _gated_class(cls: type, trainer_class: type) -> type:
    """`cls` with `GatedSFTMixin` just before `trainer_class` among its bases, where a subclass's methods come first."""
    bases = (
        (GatedSFTMixin, cls)
        if cls is trainer_class
        else (cls, _gated_class(trainer_class, trainer_class))
    )
    names = ("__module__", "__qualname__", "__doc__")
    return types.new_class(
        cls.__name__,
        bases,
        exec_body=lambda namespace: namespace.update({name: getattr(cls, name) for name in names}),
    )
