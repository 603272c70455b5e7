"""A model's forward, with another in its place: put on, kept on, and taken off without a trace."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger("deft_plugin")

_ATTRIBUTE = "_deft_gated_head"


class ReplacedForward:
    """What has taken the place of a model's forward.

    Attributes:
        model: the one whose forward it is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._own_class: Any = type(model)
        # What install() takes off the instance, so that remove() leaves no trace.
        self._own_attributes: dict[str, Any] = {}
        # A patch of the instance that was there before: accelerate's hooks, Liger's.
        self._patched_forward: Any = vars(model).get("forward")
        self._rebound: list[nn.Module] = []

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of `model`, which is `self.model`, or a replica of it in torch.nn.DataParallel."""
        raise NotImplementedError

    def install(self, outermost: nn.Module | None = None) -> None:
        """Replace the model's forward, also where `outermost`, a wrapper around it, keeps a reference to it."""
        attributes = self.model.__dict__
        for name in ("forward", "accepts_loss_kwargs"):
            if name in attributes:
                self._own_attributes[name] = attributes.pop(name)
        self.model.__class__ = _gated_class(self._own_class)
        # transformers.Trainer then passes num_items_in_batch, whatever the model's own forward takes.
        self.model.accepts_loss_kwargs = True
        setattr(self.model, _ATTRIBUTE, self)
        # PEFT's AdaptionPromptModel keeps its base model's forward, bound.
        wrappers = (outermost, getattr(outermost, "base_model", None))
        for wrapper in [each for each in wrappers if isinstance(each, nn.Module)]:
            kept = None if wrapper is self.model else vars(wrapper).get("forward")
            owner = getattr(kept, "__self__", None)
            if owner is not None and owner is self.model:
                wrapper.forward = self.model.forward
                self._rebound.append(wrapper)

    def keep_over(self, forward: Callable[..., Any]) -> None:
        """Have a forward that was to take the gated one's place on the instance run without labels alone."""
        self._own_attributes["forward"] = forward
        logger.warning(
            "%s has put another forward on a model with a gated head. It runs without labels; with labels the "
            "gated head stays.",
            getattr(forward, "__module__", type(forward).__name__),
        )

    def remove(self) -> None:
        """Give the model its own forward back.

        Raises:
            RuntimeError: something else (accelerate, FSDP, another patch) has wrapped the forward since;
                the gated head then stays, and has to be removed after that.
        """
        gated_class = _gated_class(self._own_class)
        if replacement_on(self.model) is not self:
            raise RuntimeError("This gated head is not on its model any more.")
        outermost = getattr(self.model.forward, "__func__", None)
        if type(self.model) is not gated_class or outermost is not gated_class.forward:
            raise RuntimeError(
                "The model's forward was wrapped after the gated head was added. Undo that first, for "
                "example with accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
            )
        self.model.__class__ = self._own_class
        for name in ("forward", "accepts_loss_kwargs", _ATTRIBUTE):
            self.model.__dict__.pop(name, None)
        self.model.__dict__.update(self._own_attributes)
        for wrapper in self._rebound:
            wrapper.forward = self.model.forward

    def _own_forward_of(self, model: PreTrainedModel) -> Callable[..., Any]:
        """The model's own forward, bound."""
        return self._patched_forward or functools.partial(self._own_class.forward, model)

    def _forward_without_labels_of(self, model: PreTrainedModel) -> Callable[..., Any]:
        """The model's own forward, bound, or the one that was put on the instance since."""
        # A forward on the instance is bound already: accelerate's hooks, another patch.
        return self._own_attributes.get("forward") or functools.partial(
            self._own_class.forward, model
        )


def replacement_on(model: PreTrainedModel) -> Any:
    """What has taken the place of the model's forward; None where nothing has."""
    return getattr(model, _ATTRIBUTE, None)


@functools.cache
def _gated_class(own_class: Any) -> Any:
    """A subclass whose forward is that of the model's gated head.

    A class, because a forward on the instance belongs to that instance: a deep copy's, an unpickled
    model's or a DataParallel replica's would run the first model's weights, or be lost.
    """

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return replacement_on(self).forward(self, args, kwargs)

    def __setattr__(self: PreTrainedModel, name: str, value: Any) -> None:
        # Liger's patch of an instance, which Trainer makes with use_liger_kernel=True, would undo the head silently.
        if name == "forward" and inspect.isroutine(value) and not _leads_to(value, forward):
            replacement_on(self).keep_over(value)
        else:
            super(gated_class, self).__setattr__(name, value)

    def __reduce_ex__(self: PreTrainedModel, protocol: Any) -> Any:
        # Pickle finds classes by name, and would find the model's own one.
        _, _, *state = super(gated_class, self).__reduce_ex__(protocol)
        return (_empty_gated_model, (own_class,), *state)

    # generate() and Trainer read argument names off the signature. Not functools.wraps: accelerate
    # unwraps a model along __wrapped__, and would unwrap the head too.
    forward.__signature__ = inspect.signature(own_class.forward)  # type: ignore[attr-defined]
    forward.__doc__ = own_class.forward.__doc__
    # The model's own name, which is saved in config.json and looked up by transformers.
    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(own_class, name) for name in names}
    namespace.update(forward=forward, __setattr__=__setattr__, __reduce_ex__=__reduce_ex__)
    gated_class: Any = type(own_class.__name__, (own_class,), namespace)
    return gated_class


def _leads_to(function: Any, forward: Any, depth: int = 8) -> bool:
    """Whether `function` is a wrapper around `forward`, of however many layers: accelerate's, TRL's."""
    if function is forward or not depth:
        return function is forward
    inner = [getattr(function, name, None) for name in ("__func__", "__wrapped__", "func")]
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # An empty one.
            inner.append(cell.cell_contents)
    return any(_leads_to(part, forward, depth - 1) for part in inner if callable(part))


def _empty_gated_model(own_class: Any) -> PreTrainedModel:
    gated_class = _gated_class(own_class)
    return gated_class.__new__(gated_class)
