"""A gated head: a causal LM's forward with labels runs its own forward with stand-ins, and scores the hidden states."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..objectives import Objective, build_objective
from ..ops import CoreSettings, CountedTargets, GatedLoss, linear_gated_loss
from .comparison import compare_on_tokens, has_weights_in_parts
from .labels import Labels, counted_targets, version_of
from .measurement import UnknownForwardError
from .output import GatedCausalLMOutput
from .own_forward import OwnForward
from .projection import Projection
from .refusals import check_finite, check_is_linear
from .replaced_forward import ReplacedForward
from .substitution import attribute_of
from .taken_apart import project_with

logger = logging.getLogger("deft_plugin")


class GatedHead(ReplacedForward):
    """The gated head of one model. Made by `add_gated_head`.

    Attributes:
        model: the causal LM whose forward it has taken the place of.
        objective: what labels are scored with. May be set between steps.
        with_entropy: whether to compute the Shannon entropy of every scored position.
        settings: how the loss is computed.
        own_forward: what is known of the model's own forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        with_entropy: bool,
        settings: CoreSettings,
        output_class: type[GatedCausalLMOutput],
    ) -> None:
        super().__init__(model)
        self.objective = objective
        self.with_entropy = with_entropy
        self.settings = settings
        self.output_class = output_class
        self.own_forward = OwnForward()
        self._observer: Callable[[GatedLoss], None] | None = None
        self._was_observed = False
        self._has_warned = False
        self._compares_later = False

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of `model`: gated where labels are given, its own otherwise.

        Args:
            model: `self.model`, or a replica of it in torch.nn.DataParallel.
            args, kwargs: of the model's own forward; also `num_items_in_batch` and `shift_labels`.
        """
        # TRL asks for the fused head that this one replaces.
        kwargs.pop("fused_lm_head", None)
        own_forward = self._forward_without_labels_of(model)
        positional = inspect.signature(own_forward).bind_partial(*args).arguments if args else {}
        # A TypeError where an argument is given twice.
        arguments = dict(**positional, **kwargs)
        if arguments.get("labels") is None and arguments.get("shift_labels") is None:
            return own_forward(*args, **kwargs)
        self._warn_outside_trainer()
        if self._compares_later:
            self._compares_later = False
            self._compare(model)
        return self._gated_forward(model, **arguments)

    def _warn_outside_trainer(self) -> None:
        """Say once that a loss is no negative log-likelihood, where it could be taken for one."""
        after_training = self._was_observed or not torch.is_grad_enabled()
        if self._observer is not None or self._has_warned or not after_training:
            return
        self._has_warned = True
        if self.objective.name != "nll":
            logger.warning(
                "This model has a gated head, and its loss is that of %r: exp(loss) is no perplexity, and what "
                "transformers.Trainer takes for predictions are no logits but statistics of tokens. For the model's own "
                "loss and logits: deft_plugin.gated_head_of(model).remove().",
                self.objective,
            )

    # Its stand-ins change the model for as long as it runs, which torch.compile cannot trace; it compiles
    # the model's own forward inside.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _gated_forward(
        self,
        model: PreTrainedModel,
        *,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = -100,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> GatedCausalLMOutput | tuple[Any, ...]:
        if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(
                f"logits_to_keep={logits_to_keep!r} together with labels is not supported by the gated "
                "head, which builds no logits: leave it out, or call the model without labels."
            )
        for name in ("use_cache", "return_dict"):
            kwargs.pop(name, None)
        given = Labels(labels, shift_labels, ignore_index)
        # Here, so that the number of targets is there when the backbone's work is in the device's queue.
        counted, version = counted_targets(given), version_of(given.given)

        def score(layer: Any, hidden_states: Tensor, labels: Labels, compare: bool) -> GatedLoss:
            # A forward may have changed them in place.
            unchanged = labels is given and version == version_of(given.given)
            targets = counted if unchanged else counted_targets(labels)
            _check_shape(
                model, hidden_states, targets.targets, given.given, kwargs.get("input_ids")
            )
            gated = self._score(layer, hidden_states, targets, num_items_in_batch, compare)
            return gated if given.shift_labels is not None else _without_last_position(gated)

        output, loss, gated = self.own_forward.run(
            model, self._own_forward_of(model), kwargs, given, score
        )
        if self._observer is not None:
            self._observer(gated)
        result = self.output_class.of(loss, gated, output)
        if return_dict is None:
            return_dict = getattr(model.config, "return_dict", True)
        return result if return_dict else result.to_tuple()

    # Works on tensors whose sizes depend on the labels' values, which torch.compile cannot trace.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _score(
        self,
        layer: Any,
        hidden_states: Tensor,
        targets: CountedTargets,
        num_items_in_batch: int | Tensor | None,
        compare: bool,
    ) -> GatedLoss:
        measured = self.own_forward.measured

        def score(projection: Projection) -> dict[str, Any]:
            if compare:
                check_is_linear(layer, hidden_states)
            projection = projection.first_rows(measured.vocab_size)
            gated = linear_gated_loss(
                projection.hidden_states,
                projection.weight,
                targets.to(projection.weight.device),
                self.objective,
                bias=projection.bias,
                low_rank=projection.low_rank,
                logit_scale=measured.transform.scale,
                softcap=measured.transform.softcap,
                ignore_index=targets.ignore_index,
                num_items_in_batch=num_items_in_batch,
                with_entropy=self.with_entropy,
                shard=projection.shard,
                **asdict(self.settings),
            )
            return dict(vars(gated))

        return GatedLoss(**project_with(layer, hidden_states, score))

    @contextmanager
    def observed_by(self, observer: Callable[[GatedLoss], None]) -> Iterator[None]:
        """Call `observer` with the `GatedLoss` of every gated forward in this context."""
        previous, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = previous
            self._was_observed = True

    def compare_with_own_forward(self) -> None:
        """Run the model on eight tokens and compare what its own forward does with what the head takes it for.

        Where parameters are in parts (ZeRO-3, sharded), that is done in the first gated forward, in which they are
        gathered. Where they are on meta, or the forward wants more than tokens, the first gated forward does
        the same with its own batch.

        Raises:
            ValueError: its logits or losses are not the head's; a NaN in its lm_head.
        """
        if any(parameter.is_meta for parameter in self.model.parameters()):
            return
        if has_weights_in_parts(self.model):
            self._compares_later = True
            return
        check_finite(self.model)
        self._compare(self.model)

    def _compare(self, model: PreTrainedModel) -> None:
        forward = self._own_forward_of(model)
        gated_forward = functools.partial(self._gated_forward, model)
        with (
            # An objective may need the optimizer step's mean, which is not known yet.
            attribute_of(self, "objective", build_objective("nll")),
            attribute_of(self, "_observer", None),
            attribute_of(self, "settings", self._settings_of_comparison()),
        ):
            compare_on_tokens(model, forward, gated_forward, self.own_forward)

    def _settings_of_comparison(self) -> CoreSettings:
        """The settings; "quack" is left to the first step where it may depend on that step's autocast."""
        later = self.settings.path == "quack" and self.model.dtype != torch.bfloat16
        return replace(self.settings, path="auto") if later else self.settings


def _check_shape(
    model: PreTrainedModel, hidden_states: Tensor, targets: Tensor, given: Tensor, ids: Any
) -> None:
    """Refuse hidden states (batch, sequence, H) of another shape than the targets, by whose fault they are."""
    positions = hidden_states.shape[:-1]
    if positions == targets.shape:
        return
    if isinstance(ids, Tensor) and ids.shape == positions != given.shape:
        raise ValueError(
            f"labels must have input_ids' shape, {tuple(ids.shape)}; their shape is {tuple(given.shape)}."
        )
    raise UnknownForwardError(
        model,
        f"gives its lm_head hidden states of shape {tuple(hidden_states.shape)}, where the labels are "
        f"{tuple(targets.shape)}",
    )


def _without_last_position(gated: GatedLoss) -> GatedLoss:
    """Per-token tensors (batch, sequence - 1) of (batch, sequence), whose last position has no label."""
    values = vars(gated).items()
    return GatedLoss(
        **{
            name: value[:, :-1] if isinstance(value, Tensor) and value.dim() == 2 else value
            for name, value in values
        }
    )
