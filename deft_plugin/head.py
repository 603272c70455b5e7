"""A gated head: a Hugging Face causal LM's forward with labels returns an objective's loss, never logits.

head = add_gated_head(model, "deft")
output = model(input_ids=..., labels=...)        # output.loss, output.gate, ...; no logits
model.generate(...)                              # without labels the model is unchanged
head.remove()
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import ModelOutput

from .lm_head import Projection, check_is_linear, check_lm_head, innermost, lm_head_of, project_with
from .measurement import UnknownForwardError, ordinary_tokens
from .objectives import Objective, build_objective
from .ops import CoreSettings, CountedTargets, GatedLoss, linear_gated_loss
from .ops.targets import as_integers
from .own_forward import Labels, OwnForward
from .quantization import cpu_weights_left_unpacked
from .substitution import attribute_of, in_mode

logger = logging.getLogger("deft_plugin")

_ATTRIBUTE = "_deft_gated_head"


@dataclass
class GatedCausalLMOutput(ModelOutput):
    """What a gated forward returns in place of logits.

    Per-token tensors have shape (batch, sequence - 1), or (batch, sequence) with `shift_labels`, and are 0
    where the label is -100. Dtype float32, or float64 for a float64 model.

    Args:
        loss: scalar, differentiable; with the auxiliary loss of a mixture of experts added as the model's
            own forward does.
        token_loss: differentiable per-token losses.
        label_mask: bool; which positions count.
        log_p, gate, focus, entropy, is_top1: as in `deft_plugin.GatedLoss`, detached.
        aux_loss: load-balancing loss of a mixture of experts, where router logits are asked for.
        hidden_states, attentions: the backbone's, where asked for.
    """

    loss: Tensor | None = None
    token_loss: Tensor | None = None
    label_mask: Tensor | None = None
    log_p: Tensor | None = None
    gate: Tensor | None = None
    focus: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "logits":
            raise AttributeError(
                "A gated forward builds no logits. Call the model without labels for them, or take the head off: "
                "deft_plugin.gated_head_of(model).remove()."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class GatedHead:
    """The gated head of one model. Made by `add_gated_head`.

    Attributes:
        model: the causal LM whose forward was replaced.
        objective: what labels are scored with. May be set between steps.
        with_entropy: whether to compute the Shannon entropy of every scored position.
        settings: how the loss is computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        with_entropy: bool,
        settings: CoreSettings,
        output_class: type[GatedCausalLMOutput],
    ) -> None:
        self.model = model
        self.objective = objective
        self.with_entropy = with_entropy
        self.settings = settings
        self.output_class = output_class
        self.own_forward = OwnForward()
        self._observer: Callable[[GatedLoss], None] | None = None
        self._was_observed = False
        self._has_warned = False
        self._own_class: Any = type(model)
        # What install() takes off the instance, so that remove() leaves no trace.
        self._own_attributes: dict[str, Any] = {}
        # A patch of the instance that was there before: accelerate's hooks, Liger's.
        self._patched_forward: Any = vars(model).get("forward")
        # ZeRO-3 and tensor parallelism leave parts of the weights here, on every rank alike.
        self._compares_later = False
        self._rebound: list[nn.Module] = []

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
        if getattr(self.model, _ATTRIBUTE, None) is not self:
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
        parameters = list(self.model.parameters())
        if any(parameter.is_meta for parameter in parameters):
            return
        if any(isinstance(p, DTensor) or not p.numel() for p in parameters):
            self._compares_later = True
            return
        _check_finite(self.model)
        self._compare_on_tokens(self.model)

    def _compare_on_tokens(self, model: PreTrainedModel) -> None:
        ids = ordinary_tokens(model)
        labels = ids.clone()
        labels[-1, -2:] = -100
        devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "mps")}
        own = self.own_forward
        try:
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices),
                cpu_weights_left_unpacked(model),
                # An objective may need the optimizer step's mean, which is not known yet.
                attribute_of(self, "objective", build_objective("nll")),
                attribute_of(self, "_observer", None),
                attribute_of(self, "settings", self._settings_of_comparison()),
            ):
                for training in (True, False):
                    with in_mode(model, training):
                        self._gated_forward(model, input_ids=ids, labels=labels)
                        own.examine_own_loss(model, self._forward_of(model), ids, ids)
        except Exception as error:
            if isinstance(error, UnknownForwardError) or own.called_lm_head():
                raise
            logger.debug("%s wants more than tokens: %s", type(model).__name__, error)

    def _settings_of_comparison(self) -> CoreSettings:
        """The settings; "quack" is left to the first step where it may depend on that step's autocast."""
        later = self.settings.path == "quack" and self.model.dtype != torch.bfloat16
        return replace(self.settings, path="auto") if later else self.settings

    def _forward_of(self, model: PreTrainedModel) -> Callable[..., Any]:
        """The model's own forward, bound."""
        bound: Callable[..., Any] = self._patched_forward or functools.partial(
            self._own_class.forward, model
        )
        return bound

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of `model`: gated where labels are given, its own otherwise.

        Args:
            model: `self.model`, or a replica of it in torch.nn.DataParallel.
            args, kwargs: of the model's own forward; also `num_items_in_batch` and `shift_labels`.
        """
        # TRL asks for the fused head that this one replaces.
        kwargs.pop("fused_lm_head", None)
        # A forward on the instance is bound already: accelerate's hooks, another patch.
        own_forward = self._own_attributes.get("forward") or functools.partial(
            self._own_class.forward, model
        )
        positional = inspect.signature(own_forward).bind_partial(*args).arguments if args else {}
        # A TypeError where an argument is given twice.
        arguments = dict(**positional, **kwargs)
        if arguments.get("labels") is None and arguments.get("shift_labels") is None:
            return own_forward(*args, **kwargs)
        self._warn_outside_trainer()
        if self._compares_later:
            self._compares_later = False
            self._compare_on_tokens(model)
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
            positions = hidden_states.shape[:-1]
            if positions != targets.targets.shape:
                ids = kwargs.get("input_ids")
                if isinstance(ids, Tensor) and ids.shape == positions != given.given.shape:
                    raise ValueError(
                        f"labels must have input_ids' shape, {tuple(ids.shape)}; their shape is "
                        f"{tuple(given.given.shape)}."
                    )
                raise UnknownForwardError(
                    model,
                    f"gives its lm_head hidden states of shape {tuple(hidden_states.shape)}, where the labels are "
                    f"{tuple(targets.targets.shape)}",
                )
            gated = self._score(layer, hidden_states, targets, num_items_in_batch, compare)
            return gated if given.shift_labels is not None else without_last_position(gated)

        output, loss, gated = self.own_forward.run(
            model, self._forward_of(model), kwargs, given, score
        )
        if self._observer is not None:
            self._observer(gated)
        result = self._output(loss, gated, output)
        if return_dict is None:
            return_dict = getattr(model.config, "return_dict", True)
        return result if return_dict else result.to_tuple()

    def _output(self, loss: Tensor, gated: GatedLoss, own: Any) -> GatedCausalLMOutput:
        return self.output_class(
            loss=loss,
            token_loss=gated.token_loss,
            label_mask=gated.mask,
            log_p=gated.log_p,
            gate=gated.gate,
            focus=gated.focus,
            entropy=gated.entropy,
            is_top1=gated.is_top1,
            aux_loss=getattr(own, "aux_loss", None),
            hidden_states=getattr(own, "hidden_states", None),
            attentions=getattr(own, "attentions", None),
        )

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


def without_last_position(gated: GatedLoss) -> GatedLoss:
    """Per-token tensors (batch, sequence - 1) of (batch, sequence), whose last position has no label."""
    values = vars(gated).items()
    return GatedLoss(
        **{
            name: value[:, :-1] if isinstance(value, Tensor) and value.dim() == 2 else value
            for name, value in values
        }
    )


@functools.cache
def _gated_class(own_class: Any) -> Any:
    """A subclass whose forward is that of the model's gated head.

    A class, because a forward on the instance belongs to that instance: a deep copy's, an unpickled
    model's or a DataParallel replica's would run the first model's weights, or be lost.
    """

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, _ATTRIBUTE).forward(self, args, kwargs)

    def __setattr__(self: PreTrainedModel, name: str, value: Any) -> None:
        # Liger's patch of an instance, which Trainer makes with use_liger_kernel=True, would undo the head silently.
        if name == "forward" and inspect.isroutine(value) and not _leads_to(value, forward):
            getattr(self, _ATTRIBUTE).keep_over(value)
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


def add_gated_head(
    model: PreTrainedModel,
    objective: str | Objective = "deft",
    parameters: Mapping[str, Any] | None = None,
    *,
    with_entropy: bool = False,
    path: str = "auto",
    tile_rows: int | None = None,
    skip_below: float = 0.0,
    output_class: type[GatedCausalLMOutput] = GatedCausalLMOutput,
) -> GatedHead:
    """Give a Hugging Face causal LM a gated head, in place.

    From then on `model(..., labels=...)` (or `shift_labels=`) runs the backbone, scores the labelled
    positions with `linear_gated_loss` and returns a `GatedCausalLMOutput`; without labels the forward is the
    original one. A PEFT model's base model is patched, so adapters and prompt tuning work as before.
    Add the head before the model is wrapped for distributed training.

    The model's class becomes a subclass of the same name. Deep copies, pickles and DataParallel replicas of the
    model have the head too.

    Before it installs itself, the head runs the model's own forward on eight tokens with stand-ins for lm_head and
    loss, and measures what it does to logits and labels; a forward that does what is not known here is refused.

    Args:
        model: a `PreTrainedModel` with an lm_head, or a PEFT model of one.
        objective: a registered name or an `Objective`.
        parameters: the named objective's parameters.
        with_entropy: also compute the Shannon entropy of every scored position.
        path, tile_rows, skip_below: as in `linear_gated_loss`.
        output_class: class of the output, for adapters that need other names on it.

    Raises:
        ValueError: a bad objective or parameter; a gated head that is there already; a model without an lm_head, or
            whose lm_head is no linear layer (plain or quantised, with LoRA, trainable tokens or in
            modules_to_save) or has another adapter (DoRA, for one); an encoder-decoder, a masked LM and others
            whose labels are not the next token; NaN in the lm_head; a forward, logits or losses that are not what
            the head takes them for (docs/models.md lists the classes). Where weights are partitioned, sharded or on
            meta, or the forward wants more than tokens, the last is found at the first gated forward.
    """
    objective = build_objective(objective, parameters)
    settings = CoreSettings(path, tile_rows, skip_below)
    outermost, model = model, causal_lm_of(model)
    check_model(model)
    present = getattr(model, _ATTRIBUTE, None)
    if present is not None:
        raise ValueError(
            f"The model has a gated head with {present.objective!r} already. Set its `objective`, or "
            "remove() it first."
        )
    head = GatedHead(model, objective, with_entropy, settings, output_class)
    head.compare_with_own_forward()
    head.install(outermost)
    return head


def gated_head_of(model: PreTrainedModel) -> GatedHead | None:
    """The gated head on `model` or on the base model inside a PEFT model; None without one."""
    return getattr(causal_lm_of(model), _ATTRIBUTE, None)


def causal_lm_of(model: PreTrainedModel) -> PreTrainedModel:
    """The causal LM itself, out of a PEFT model."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def check_model(model: PreTrainedModel) -> None:
    """Raise `ValueError` where `model` (not PEFT-wrapped) cannot have a gated head."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{name} is not a Hugging Face causal LM. The gated head goes on the model itself, before "
            "torch.compile, DDP or another wrapper is put around it."
        )
    if getattr(model.config, "is_encoder_decoder", False) or (
        LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss) is not ForCausalLMLoss
    ):
        raise ValueError(
            f"{name} is not a decoder-only causal LM: its labels are not the next token. Use "
            "deft_plugin.gated_loss on its logits instead."
        )
    layer = lm_head_of(model)
    if layer is None:
        raise ValueError(f"{name} has no lm_head: a causal LM is needed.")
    check_lm_head(layer)


def _check_finite(model: PreTrainedModel) -> None:
    """Raise `ValueError` where the lm_head has numbers that are none."""
    weight = getattr(innermost(lm_head_of(model)), "weight", None)
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return  # Quantised: whole numbers, with scales.
    if weight.element_size() < 2:
        return  # The same in floating numbers of 8 bits.
    not_finite = int((~weight.detach().isfinite()).sum())
    if not_finite:
        raise ValueError(
            f"{type(model).__name__}'s lm_head has {not_finite:,} NaN or infinite numbers of {weight.numel():,}: the "
            "checkpoint is damaged or was saved after training diverged."
        )
