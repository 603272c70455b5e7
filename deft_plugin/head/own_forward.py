"""The model's own forward, run with stand-ins: it does everything but build logits.

For as long as a gated forward runs, stand-ins are in the places of the lm_head and of the loss function (`stand_ins`).
Whatever else the forward does, it does itself: images and audio, multipliers, layers between backbone and lm_head,
which labels count, the auxiliary loss of a mixture of experts.

What the forward does to logits and in its loss is measured, not read off the configuration (`measurement`, `own_loss`):
in the first forward, and in the first after anything has changed that it could depend on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..ops import GatedLoss
from .auxiliary_loss import with_auxiliary_loss
from .labels import Labels
from .lm_head import lm_head_device, lm_head_of, lm_head_width
from .measurement import PROBE_SHAPE, Measurement, UnknownForwardError, measure, probe_of, state_of
from .own_loss import (
    auxiliary_coefficient,
    check_loss,
    check_loss_functions,
    check_same_logits,
    cross_entropy,
    drops_masked_labels,
)
from .stand_ins import LmHeadStandIn, LossStandIn, models_around, places_of, standing_in

# States whose measurements are kept: a trainer goes back and forth between training and evaluation.
_MOST_STATES = 16

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
        self._stand_in = LmHeadStandIn()
        self._loss = LossStandIn()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has an lm_head of its own.
        return {**vars(self), "_stand_in": LmHeadStandIn(), "_loss": LossStandIn(), "_states": {}}

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
        state = state_of(model, layer)
        known = self._states.get(state)
        if known is None:
            self._places = places_of(model, layer)
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
            [part.loss_function for part in models_around(model, own._places)]
            if self.measuring
            else []
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
        if self.own.measured.drops_masked_labels:
            labels = labels.without_masked(self.arguments.get("attention_mask"))
        loss = self._score_once(logits, labels).loss
        return with_auxiliary_loss(model, loss, output, self.own.measured.auxiliary_coefficient)

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
