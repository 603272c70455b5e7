"""The model's own forward, run with stand-ins: it does everything but build logits.

For as long as a gated forward runs, the lm_head's place in the model is taken by a module that keeps the hidden
states it is handed and returns a few numbers in place of logits, and the place of the loss function by one
that scores those hidden states. Whatever else the forward does, it does itself: images and audio,
multipliers, layers between backbone and lm_head, which labels count, the auxiliary loss of a mixture of experts.

What the forward does to logits is measured, not read off the configuration (`measurement`): in the first forward, and
in the first after anything has changed that it could depend on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .lm_head import innermost, lm_head_device, lm_head_of, lm_head_width
from .measurement import (
    PROBE_SHAPE,
    UnknownForwardError,
    auxiliary_coefficient,
    check_loss,
    check_loss_functions,
    check_same_logits,
    cross_entropy,
    drops_masked_labels,
    measure,
    probe_of,
)
from .ops import GatedLoss
from .ops.projection import LogitsTransform
from .substitution import attribute_of, child_of

# States whose measurements are kept: a trainer goes back and forth between training and evaluation.
_MOST_STATES = 16


@dataclass(frozen=True)
class Measurement:
    """What a model's own forward does, in one state of the model.

    Args:
        transform: what it does to its logits.
        vocab_size: how many of the lm_head's columns it keeps.
        takes_labels: whether it leaves the loss to `loss_function` when it is given labels. Otherwise it is
            run without them, and a mixture's auxiliary loss is added here.
        auxiliary_coefficient: of that auxiliary loss; None where it had none.
        drops_masked_labels: whether its loss leaves out labels where attention_mask is 0.
    """

    transform: LogitsTransform = field(default_factory=LogitsTransform)
    vocab_size: int = 0
    takes_labels: bool = True
    auxiliary_coefficient: float | None = None
    drops_masked_labels: bool = False


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


# Of the lm_head, the hidden states that it was given, what to score them on, and whether the layer is still to be
# compared with its weight.
Score = Callable[[Any, Tensor, Labels, bool], GatedLoss]


class OwnForward:
    """Runs a model's own forward with stand-ins in it, and knows what has been measured of it.

    Attributes:
        measured: what it does in the state that the model was in last.
    """

    def __init__(self) -> None:
        self.measured = Measurement()
        self._states: dict[tuple[Any, ...], Measurement] = {}
        self._state: tuple[Any, ...] = ()
        self._places: list[str] = []
        self._options: dict[str, Any] = {}
        self._stand_in = _StandIn()
        self._loss = _Loss()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has an lm_head of its own.
        return {**vars(self), "_stand_in": _StandIn(), "_loss": _Loss(), "_states": {}}

    def called_lm_head(self) -> bool:
        """Whether the forward that ran last, or failed, got as far as its lm_head."""
        return bool(self._stand_in.hidden_states)

    # torch.compile is for the model's own forward inside.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def run(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        arguments: Mapping[str, Any],
        labels: Labels,
        score: Score,
    ) -> tuple[Any, Tensor, GatedLoss]:
        """The forward's output, its loss () with `score`'s in the place of cross-entropy, and the score itself.

        Args:
            model: whose forward it is.
            forward: its own one, bound.
            arguments: of the forward, without labels.
            labels: what it is to be scored on; the forward may have a word in that.
            score: called when `measured` holds.

        Raises:
            UnknownForwardError: it does not call its lm_head once, or does something with its logits or its loss
                that is not known.
        """
        # Looked up on each call: PEFT and FSDP may have replaced it, or put an adapter on it.
        layer = lm_head_of(model)
        state = _state_of(model, layer)
        known = self._states.get(state)
        if known is None:
            self._places = _places_of(model, layer)
            self._options = _options_of(forward)
            # What its own loss does besides is no matter of state.
            self.measured = replace(self.measured, takes_labels=True)
        else:
            self.measured = known
        arguments = {**arguments, **self._options}
        # Of the batch's size where that is small; a forward's own loss wants one that fits its labels.
        shape = tuple(labels.given.shape)
        small = shape if labels.given.numel() <= 4 * PROBE_SHAPE[0] * PROBE_SHAPE[1] else (1, 4)
        run = _Run(self, model, layer, forward, arguments, labels, score, known is None)
        try:
            result = run(small)
        except UnknownForwardError as error:
            if known is not None or small == shape or not isinstance(error.__cause__, Exception):
                raise
            result = run(shape)
        if len(self._states) >= _MOST_STATES:
            self._states.clear()
        self._state = state
        self._states[state] = self.measured
        return result

    def examine_own_loss(
        self, model: PreTrainedModel, forward: Callable[..., Any], ids: Tensor, labels: Tensor
    ) -> None:
        """Find out what a loss that is the forward's own does beside cross-entropy, on logits of ordinary size.

        It may leave out labels where attention_mask is 0, and add its auxiliary loss with some coefficient.

        Args:
            model, forward: whose loss it is.
            ids, labels: (batch, sequence), few.

        Raises:
            UnknownForwardError: it does something else.
        """
        if self.measured.takes_labels:
            return
        arguments = {"input_ids": ids, "labels": labels, **self._options}
        layer = lm_head_of(model)
        probe = probe_of(tuple(ids.shape), lm_head_width(layer), lm_head_device(layer))
        self._stand_in.begin(layer, probe.detach().clamp(-1, 1), False)
        with standing_in(model, self._places, self._stand_in, self._loss):
            output = forward(**arguments)
            coefficient = auxiliary_coefficient(
                model, output.loss, cross_entropy(output.logits, labels), output
            )
            drops = False
            if _accepts(forward, "attention_mask"):
                mask = torch.ones_like(ids)
                mask[:, -1] = 0
                output = forward(**arguments, attention_mask=mask)
                drops = drops_masked_labels(model, output, labels, mask, coefficient)
        self.measured = replace(
            self.measured, drops_masked_labels=drops, auxiliary_coefficient=coefficient
        )
        self._states[self._state] = self.measured


class _Run:
    """One call of a model's own forward with stand-ins."""

    def __init__(
        self,
        own: OwnForward,
        model: PreTrainedModel,
        layer: Any,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        labels: Labels,
        score: Score,
        measuring: bool,
    ) -> None:
        self.own, self.model, self.layer = own, model, layer
        self.forward, self.arguments, self.labels = forward, arguments, labels
        self.score, self.measuring = score, measuring
        self.stand_in, self.loss = own._stand_in, own._loss
        self.with_gradients = torch.is_grad_enabled()
        self.gated: GatedLoss | None = None
        self.refusal: Exception | None = None

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, probe_shape: tuple[int, ...]) -> tuple[Any, Tensor, GatedLoss]:
        own, model = self.own, self.model
        width, device = lm_head_width(self.layer), lm_head_device(self.layer)
        probe = (
            probe_of(probe_shape, width, device)
            if self.measuring
            else torch.zeros(1, 1, width, device=device)
        )
        self.functions = (
            [part.loss_function for part in _around(model, own._places)] if self.measuring else []
        )
        self.gated, self.refusal = None, None
        self.stand_in.begin(self.layer, probe, self.measuring)
        self.loss.begin(self._score_once, self.labels.ignore_index)
        try:
            # The stand-in records gradients from lm_head on, whatever the mode here.
            with (
                standing_in(model, own._places, self.stand_in, self.loss),
                torch.set_grad_enabled(self.with_gradients),
            ):
                output = self._output()
                total = self._total(output)
        except Exception as error:
            known = error is self.refusal or isinstance(error, UnknownForwardError)
            if known or not self.stand_in.hidden_states:
                raise
            raise UnknownForwardError(
                model,
                "does not have the form backbone, lm_head, logits, loss that the gated head replaces "
                f"({type(error).__name__}: {error})",
            ) from error
        finally:
            self.loss.begin()
        assert self.gated is not None
        return output, total, self.gated

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _output(self) -> Any:
        """The forward's, with labels where it leaves the loss to its loss function."""
        if self.own.measured.takes_labels:
            output = self.forward(**self.arguments, labels=self.labels.given)
            if self.stand_in.hidden_states:
                return output
            # It has a loss of its own, on hidden states.
            self._forget_labels()
        return self.forward(**self.arguments)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _total(self, output: Any) -> Tensor:
        """The loss (), which is scored here unless the loss function did."""
        model, probe, logits = self.model, self.stand_in.logits, output.logits
        if self.gated is not None:
            if self.measuring:
                check_same_logits(model, logits, self.loss.logits)
                check_loss(model, output.loss, self.gated.loss, output, probe)
            total: Tensor = output.loss
            return total
        if self.own.measured.takes_labels and self.measuring:
            counted = cross_entropy(logits, self.labels.given)
            check_loss(model, output.loss, counted, output, probe)
        self._forget_labels()
        labels = self.labels
        mask = self.arguments.get("attention_mask")
        if (
            self.own.measured.drops_masked_labels
            and labels.labels is not None
            and isinstance(mask, Tensor)
            and mask.shape == labels.labels.shape
        ):
            without = labels.labels.masked_fill(mask == 0, labels.ignore_index)
            labels = replace(labels, labels=without)
        return self._with_auxiliary_loss(self._score_once(logits, labels).loss, output)

    def _forget_labels(self) -> None:
        self.own.measured = replace(self.own.measured, takes_labels=False)

    def _score_once(self, logits: Any, labels: Labels | None = None) -> GatedLoss:
        own, stand_in, model = self.own, self.stand_in, self.model
        try:
            with torch.set_grad_enabled(self.with_gradients):
                hidden_states = stand_in.handed(model, self.with_gradients)
                if self.measuring:
                    with torch.enable_grad():
                        transform, vocab_size = measure(model, stand_in.logits, logits)
                        if self.loss.logits is not None:
                            check_loss_functions(model, self.functions, logits)
                    own.measured = replace(own.measured, transform=transform, vocab_size=vocab_size)
                labels = self._those_that_count(labels or self.labels)
                self.gated = self.score(self.layer, hidden_states, labels, self.measuring)
        except Exception as error:
            self.refusal = error
            raise
        return self.gated

    def _those_that_count(self, labels: Labels) -> Labels:
        """The labels that the forward gave to its loss function, where they are not those that it was given."""
        found, passed = labels.given, self.labels.given
        as_shifted = labels.shift_labels is not None and self.labels.shift_labels is None
        same = found is passed or (
            found.shape == passed.shape and torch.equal(found.to(passed.device), passed)
        )
        if same and not as_shifted and labels.ignore_index == self.labels.ignore_index:
            return self.labels
        return labels

    def _with_auxiliary_loss(self, loss: Tensor, output: Any) -> Tensor:
        """`loss` with a mixture's load-balancing loss, for a forward that was not given labels."""
        aux_loss = getattr(output, "aux_loss", None)
        if not isinstance(aux_loss, Tensor):
            return loss
        coefficient = self.own.measured.auxiliary_coefficient
        if coefficient is None:
            coefficient = getattr(self.model, "router_aux_loss_coef", None)
        if coefficient is None:
            coefficient = self.model.config.router_aux_loss_coef
        return loss + float(coefficient) * aux_loss.to(loss.device)


class _StandIn(nn.Module):
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


class _Loss:
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


def _places_of(model: PreTrainedModel, layer: nn.Module) -> list[str]:
    """The names under which `layer` is in `model`; {} is no answer, since something must take its place."""
    modules = model.named_modules(remove_duplicate=False)
    found = [name for name, module in modules if module is layer]
    if not found:
        raise UnknownForwardError(model, "has an lm_head that is no part of the model")
    return found


def _options_of(forward: Callable[..., Any]) -> dict[str, Any]:
    """Arguments with which a forward returns logits in an output, and nothing that is only for generating."""
    options: dict[str, Any] = {
        name: value
        for name, value in (("use_cache", False), ("return_dict", True))
        if _accepts(forward, name)
    }
    # In training, Liger's forwards have a loss on hidden states else.
    if "skip_logits" in inspect.signature(forward).parameters:
        options["skip_logits"] = False
    return options


def _accepts(forward: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(forward).parameters
    return name in parameters or any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _around(model: PreTrainedModel, places: list[str]) -> list[PreTrainedModel]:
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
        for part in _around(model, places):
            stack.enter_context(attribute_of(part, "_loss_function", loss))
        for config in _configs_of(model):
            # Where it is False, most forwards fail on what their own backbone returns.
            stack.enter_context(attribute_of(config, "return_dict", True))
        for place in places:
            parent, _, name = place.rpartition(".")
            stack.enter_context(child_of(model.get_submodule(parent), name, stand_in))
        yield


def _state_of(model: PreTrainedModel, layer: Any) -> tuple[Any, ...]:
    """What a measurement holds for: a user may change a softcap, PEFT put an adapter on the lm_head."""
    numbers = tuple(
        value
        for owner in (*_configs_of(model), model)
        for name, value in vars(owner).items()
        if isinstance(value, int | float)
        and not name.startswith("_")
        and name != "accepts_loss_kwargs"
    )
    inner = innermost(layer)
    hooks = (len(inner._forward_pre_hooks), len(inner._forward_hooks))
    loss_function: Any = model.loss_function
    loss_function = getattr(loss_function, "__func__", loss_function)
    return type(layer), len(_modules_inside(layer)), hooks, id(loss_function), numbers


def _configs_of(model: PreTrainedModel) -> list[Any]:
    text = model.config.get_text_config()
    return [model.config] if text is model.config else [model.config, text]


def _modules_inside(layer: Any) -> list[Any]:
    return list(layer.modules()) if isinstance(layer, nn.Module) else []
