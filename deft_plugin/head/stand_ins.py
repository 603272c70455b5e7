"""Stand-ins for a model's lm_head and for its loss function, and how they get into the model.

One keeps the hidden states that it is handed and returns a few numbers in place of logits; the other scores those
hidden states in the place of cross-entropy on the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..ops import GatedLoss
from .configuration import configs_of
from .labels import Labels
from .measurement import UnknownForwardError
from .substitution import attribute_of, child_of


class LmHeadStandIn(nn.Module):
    """In the lm_head's place: keeps what it is given, returns `logits`, and else passes for the layer.

    One object for all forwards: torch.compile traces a module that is another each time anew.
    """

    def begin(self, layer: Any, logits: Tensor, recording: bool) -> None:
        """Stand in for `layer`, and return `logits`; `recording` what becomes of them for autograd."""
        # Not a child and not a buffer: they are no part of the model.
        self.__dict__.update(
            layer=layer, logits=logits, recording=recording, hidden_states=[], grad_modes=[]
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._keep(hidden_states)
        # Unsloth's forwards scale logits in place.
        logits: Tensor = self.logits.clone()
        return logits

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep(self, hidden_states: Tensor) -> None:
        self.hidden_states.append(hidden_states)
        self.grad_modes.append(torch.is_grad_enabled())
        if self.recording:
            torch.set_grad_enabled(True)

    def handed(self, model: nn.Module, with_gradients: bool) -> Tensor:
        """The hidden states that the lm_head was given."""
        if len(self.hidden_states) != 1:
            times = len(self.hidden_states)
            raise UnknownForwardError(model, f"calls its lm_head {times} times in one pass")
        if with_gradients and not self.grad_modes[0]:
            raise UnknownForwardError(
                model,
                "calls its lm_head where no gradients are recorded (in a reentrant checkpoint, for one), so that nothing "
                "before it would train",
            )
        hidden_states: Tensor = self.hidden_states[0]
        return hidden_states

    def __getattr__(self, name: str) -> Any:
        # Forwards ask their lm_head for its weight's dtype.
        if name == "hidden_states":
            return []
        if "layer" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["layer"], name)


class LossStandIn:
    """In the place of `loss_function`: keeps the logits it is given, and returns the score's loss."""

    def __init__(self) -> None:
        self.logits: Any = None
        self._score: Callable[[Any, Labels | None], GatedLoss] | None = None
        self._ignore_index = -100

    def begin(
        self,
        score: Callable[[Any, Labels | None], GatedLoss] | None = None,
        ignore_index: int = -100,
    ) -> None:
        """Score with this from now on, or with nothing."""
        self.logits, self._score, self._ignore_index = None, score, ignore_index

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self,
        logits: Any,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        assert self._score is not None
        self.logits = logits
        if num_items_in_batch is not None:
            raise ValueError("num_items_in_batch is set by the forward itself")
        given = None
        if labels is not None or shift_labels is not None:
            if ignore_index is None:
                ignore_index = self._ignore_index
            given = Labels(labels, shift_labels, ignore_index)
        return self._score(logits, given).loss


def places_of(model: PreTrainedModel, layer: nn.Module) -> list[str]:
    """The names under which `layer` is in `model`; {} is no answer, since something must take its place."""
    modules = model.named_modules(remove_duplicate=False)
    found = [name for name, module in modules if module is layer]
    if not found:
        raise UnknownForwardError(model, "has an lm_head that is no part of the model")
    return found


def models_around(model: PreTrainedModel, places: list[str]) -> list[PreTrainedModel]:
    """The model, and the models in it that have the lm_head, whose forwards may call it."""
    names = {""}
    for place in places:
        path = place.split(".")[:-1]
        names.update(".".join(path[: index + 1]) for index in range(len(path)))
    parts = (model.get_submodule(name) for name in sorted(names))
    return [part for part in parts if isinstance(part, PreTrainedModel)]


@contextmanager
def standing_in(
    model: PreTrainedModel, places: list[str], stand_in: nn.Module, loss: Any
) -> Iterator[None]:
    """Have the stand-ins in the model: for the lm_head at `places`, and for the losses of what is around it."""
    with ExitStack() as stack:
        for part in models_around(model, places):
            stack.enter_context(attribute_of(part, "_loss_function", loss))
        for config in configs_of(model):
            # Where it is False, most forwards fail on what their own backbone returns.
            stack.enter_context(attribute_of(config, "return_dict", True))
        for place in places:
            parent, _, name = place.rpartition(".")
            stack.enter_context(child_of(model.get_submodule(parent), name, stand_in))
        yield
