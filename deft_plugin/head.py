"""A gated head: a Hugging Face causal LM's forward with labels returns an objective's loss, never logits.

head = add_gated_head(model, "deft")
output = model(input_ids=..., labels=...)        # output.loss, output.gate, ...; no logits
model.generate(...)                              # without labels the model is unchanged
head.remove()
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import ModelOutput

from .objectives import Objective, build_objective
from .ops import CoreSettings, GatedLoss, linear_gated_loss
from .ops.projection import LogitsTransform, project
from .ops.shard import VocabularyShard

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
        self.transform = logits_transform(model)
        self._observer: Callable[[GatedLoss], None] | None = None
        self._own_class: Any = type(model)
        # What install() takes off the instance, so that remove() leaves no trace.
        self._own_attributes: dict[str, Any] = {}

    def install(self) -> None:
        """Replace the model's forward."""
        attributes = self.model.__dict__
        for name in ("forward", "accepts_loss_kwargs"):
            if name in attributes:
                self._own_attributes[name] = attributes.pop(name)
        self.model.__class__ = _gated_class(self._own_class)
        # transformers.Trainer then passes num_items_in_batch, whatever the model's own forward takes.
        self.model.accepts_loss_kwargs = True
        setattr(self.model, _ATTRIBUTE, self)

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

    @contextmanager
    def observed_by(self, observer: Callable[[GatedLoss], None]) -> Iterator[None]:
        """Call `observer` with the `GatedLoss` of every gated forward in this context."""
        previous, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = previous

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
        return self._gated_forward(model, **arguments)

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
        if getattr(model.config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        kwargs.update(use_cache=False, return_dict=True)
        backbone = model.base_model(**kwargs)
        hidden_states = backbone.last_hidden_state
        if shift_labels is None:
            assert labels is not None
            # Shifting the labels, not the hidden states, avoids a copy of these and one of their gradient.
            targets = functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
        else:
            targets = shift_labels
        gated = self._score(model, hidden_states, targets, num_items_in_batch, ignore_index)
        if shift_labels is None:
            gated = without_last_position(gated)
        if self._observer is not None:
            self._observer(gated)
        loss, aux_loss = gated.loss, None
        if kwargs.get("output_router_logits"):
            aux_loss = auxiliary_loss(
                self._own_class, model, backbone.router_logits, kwargs.get("attention_mask")
            )
            if aux_loss is not None:
                loss = loss + auxiliary_coefficient(model) * aux_loss.to(loss.device)
        output = self.output_class(
            loss=loss,
            token_loss=gated.token_loss,
            label_mask=gated.mask,
            log_p=gated.log_p,
            gate=gated.gate,
            focus=gated.focus,
            entropy=gated.entropy,
            is_top1=gated.is_top1,
            aux_loss=aux_loss,
            hidden_states=getattr(backbone, "hidden_states", None),
            attentions=getattr(backbone, "attentions", None),
        )
        if return_dict is None:
            return_dict = getattr(model.config, "return_dict", True)
        return output if return_dict else output.to_tuple()

    # Works on tensors whose sizes depend on the labels' values, which torch.compile cannot trace.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _score(
        self,
        model: PreTrainedModel,
        hidden_states: Tensor,
        targets: Tensor,
        num_items_in_batch: int | Tensor | None,
        ignore_index: int,
    ) -> GatedLoss:
        # Looked up on each call: PEFT and FSDP may have replaced it, or put an adapter on it.
        layer = model.get_output_embeddings()

        def score(hidden_states: Tensor) -> dict[str, Any]:
            check_lm_head(layer)
            if isinstance(hidden_states, DTensor):
                raise ValueError(
                    "lm_head is tensor parallel and an FSDP module of its own, whose hooks do not go together "
                    "with the gated head. Leave lm_head in the model's own FSDP module: do not call "
                    "fully_shard on it."
                )
            weight, bias, shard = _head_parameters(layer)
            gated = linear_gated_loss(
                hidden_states.to(weight.device),
                weight,
                targets.to(weight.device),
                self.objective,
                bias=bias,
                logit_scale=self.transform.scale,
                softcap=self.transform.softcap,
                ignore_index=ignore_index,
                num_items_in_batch=num_items_in_batch,
                with_entropy=self.with_entropy,
                shard=shard,
                **asdict(self.settings),
            )
            return dict(vars(gated))

        if isinstance(layer, FSDPModule) or hasattr(layer, "ds_id"):
            return GatedLoss(**_called_as(layer, score, hidden_states))
        return GatedLoss(**score(hidden_states))


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
    namespace.update(forward=forward, __reduce_ex__=__reduce_ex__)
    gated_class: Any = type(own_class.__name__, (own_class,), namespace)
    return gated_class


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

    Before it installs itself, the head compares its logits and losses with those of the model's own
    forward on random hidden states, so that an architecture which treats them in a way unknown here is
    refused.

    Args:
        model: a `PreTrainedModel` with an lm_head, or a PEFT model of one.
        objective: a registered name or an `Objective`.
        parameters: the named objective's parameters.
        with_entropy: also compute the Shannon entropy of every scored position.
        path, tile_rows, skip_below: as in `linear_gated_loss`.
        output_class: class of the output, for adapters that need other names on it.

    Raises:
        ValueError: a bad objective or parameter; a model without a plain linear lm_head (an adapter on it,
            quantised, none); a multi-modal, encoder-decoder or masked LM; logits or losses that differ
            from the model's own.
    """
    objective = build_objective(objective, parameters)
    settings = CoreSettings(path, tile_rows, skip_below)
    model = causal_lm_of(model)
    check_model(model)
    present = getattr(model, _ATTRIBUTE, None)
    if present is not None:
        raise ValueError(
            f"The model has a gated head with {present.objective!r} already. Set its `objective`, or "
            "remove() it first."
        )
    head = GatedHead(model, objective, with_entropy, settings, output_class)
    check_against_own_forward(model, head.transform)
    head.install()
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
    if model.config.get_text_config() is not model.config:
        raise ValueError(
            f"{name} is multi-modal: the gated head supports text-only causal LMs. Load the language "
            "model alone, or use TRL's own loss_type."
        )
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{name} has no lm_head: a causal LM is needed.")
    check_lm_head(layer)


def check_lm_head(layer: Any) -> None:
    """Raise `ValueError` where the lm_head is more or less than a linear layer with a floating weight."""
    kind = type(layer).__name__
    if hasattr(layer, "lora_A") or hasattr(layer, "base_layer"):
        raise ValueError(
            f"A PEFT adapter on lm_head ({kind}) is not supported: the head's weight is used directly, so "
            "the adapter would not be trained. Remove lm_head from target_modules; to train the head, "
            "put it into modules_to_save."
        )
    if not isinstance(layer, nn.Linear) and not hasattr(layer, "modules_to_save"):
        raise ValueError(
            f"The lm_head is a {kind}; the gated head needs a plain torch.nn.Linear (or one in PEFT's "
            "modules_to_save)."
        )
    weight = layer.weight
    # Quantised weights are parameters of a class of their own, some with a floating dtype.
    if type(weight) not in (nn.Parameter, Tensor, DTensor) or not weight.is_floating_point():
        raise ValueError(
            f"The lm_head is quantised ({kind}, {type(weight).__name__} of {weight.dtype}). Keep it out of "
            'quantisation: BitsAndBytesConfig(..., llm_int8_skip_modules=["lm_head"]).'
        )


def logits_transform(model: PreTrainedModel) -> LogitsTransform:
    """What the model does to its logits, read off its configuration."""
    config = model.config

    def value(name: str) -> float | None:
        number = getattr(config, name, None)
        # MPT's logit_scale may be a word, which its forward ignores.
        return float(number) if isinstance(number, int | float) else None

    scale = 1.0
    for multiplier in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        factor = value(multiplier)
        if factor is not None:
            scale = factor
            break
    else:
        scaling = value("logits_scaling")
        if scaling is not None:
            scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    return LogitsTransform(scale, value("final_logit_softcapping"))


def auxiliary_loss(
    own_class: type, model: PreTrainedModel, router_logits: Any, attention_mask: Tensor | None
) -> Tensor | None:
    """A mixture's load-balancing loss, scalar, by the function in the module of its class; None without one."""
    function = getattr(sys.modules[own_class.__module__], "load_balancing_loss_func", None)
    if function is None:
        return None
    loss: Tensor = function(
        router_logits, model.num_experts, model.num_experts_per_tok, attention_mask
    )
    return loss


def auxiliary_coefficient(model: PreTrainedModel) -> float:
    """The factor on the auxiliary loss; TRL sets it in the configuration, which some models lack it in."""
    coefficient: float | None = getattr(model.config, "router_aux_loss_coef", None)
    return float(model.router_aux_loss_coef) if coefficient is None else coefficient


def check_against_own_forward(model: PreTrainedModel, transform: LogitsTransform) -> None:
    """Raise `ValueError` where the model's logits or losses are not what the head takes them for.

    Compared on a random output that stands in for the backbone's.
    """
    name = type(model).__name__
    advice = "Use deft_plugin.gated_loss on its logits instead."
    weight = model.get_output_embeddings().weight
    if weight.is_meta or weight.numel() == 0 or isinstance(weight, DTensor):
        return  # Not loaded, or partitioned by ZeRO-3 or FSDP.
    not_finite = int((~weight.detach().isfinite()).sum())
    if not_finite:
        raise ValueError(
            f"{name}'s lm_head has {not_finite:,} NaN or infinite numbers of {weight.numel():,}: the checkpoint "
            "is damaged or was saved after training diverged."
        )
    try:
        with torch.no_grad():
            pairs = _own_and_expected(model, transform)
    except Exception as error:
        raise ValueError(
            f"{name}: its forward does not have the form backbone, lm_head, logits that the gated head "
            f"replaces ({type(error).__name__}: {error}). {advice}"
        ) from error
    for what, (own, expected) in pairs.items():
        if own is None and expected is None:
            continue
        if own is None or expected is None:
            wrong = f"the model has {'none' if own is None else 'one'}"
        else:
            difference = (own.float() - expected.float()).abs().max().item()
            # Logits in bfloat16 are good to 1 %. The losses are of the same logits.
            tolerance = 0.02 if what == "logits" else 0.001
            if difference <= tolerance * max(own.abs().max().item(), 1e-6):
                continue
            wrong = f"it differs by {difference:.3g}, with {transform}"
        raise ValueError(
            f"{name}'s own forward gives another {what} than the gated head: {wrong}. {advice}"
        )


def _own_and_expected(
    model: PreTrainedModel, transform: LogitsTransform
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    layer: Any = model.get_output_embeddings()
    weight, bias = layer.weight, getattr(layer, "bias", None)
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(1, 4, weight.size(1), generator=generator).to(weight)
    # Logits of some tens, where a softcap bends them.
    largest = functional.linear(hidden_states, weight).abs().max()
    hidden_states.mul_(20 / largest.clamp(min=1e-6))
    input_ids = torch.randint(weight.size(0), (1, 4), generator=generator).to(weight.device)
    stand_in = _StandIn(last_hidden_state=hidden_states)
    aux_loss = None
    if getattr(model.config, "output_router_logits", False):
        router_logits = torch.randn(4, getattr(model, "num_experts", 1), generator=generator)
        stand_in["router_logits"] = (router_logits.to(weight.device),)
        aux_loss = auxiliary_loss(type(model), model, stand_in.router_logits, None)
    # The class's, since a trainer may have put a loss of its own on the instance.
    own_forward = functools.partial(type(model).forward, model)
    training = model.training
    model.training = False  # Liger's forward gives logits in evaluation alone.
    try:
        with _forward_of(model.base_model, lambda *args, **kwargs: stand_in):
            own = own_forward(input_ids=input_ids, use_cache=False, return_dict=True)
            labelled = own_forward(input_ids=input_ids, labels=input_ids, use_cache=False)
    finally:
        model.training = training
    loss = functional.cross_entropy(own.logits[0, :-1].float(), input_ids[0, 1:])
    if aux_loss is not None:
        loss = loss + model.router_aux_loss_coef * aux_loss
    return {
        "logits": (own.logits, project(hidden_states, weight, bias, transform)),
        "auxiliary loss": (getattr(own, "aux_loss", None), aux_loss),
        "loss": (labelled.loss, loss),
    }


@dataclass
class _StandIn(ModelOutput):
    """A backbone's output, with None for whatever else a forward reads off it."""

    last_hidden_state: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


def _head_parameters(layer: Any) -> tuple[Tensor, Tensor | None, VocabularyShard | None]:
    """The lm_head's weight (V, H), its bias (V,) or None, and which part of them tensor parallelism left here."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if weight.is_meta:
        raise ValueError(
            "The lm_head's weight is offloaded (device_map), and the gated head reads it directly: give "
            "lm_head a device."
        )
    if not isinstance(weight, DTensor):
        return weight, bias, None
    shard = _shard_of(weight)
    return weight.to_local(), bias.to_local() if isinstance(bias, DTensor) else bias, shard


def _shard_of(weight: DTensor) -> VocabularyShard | None:
    """The rows of an lm_head's weight on this rank; None where every rank has all of them."""
    mesh, placements = weight.device_mesh, weight.placements
    if all(placement.is_replicate() for placement in placements):
        return None
    if mesh.ndim != 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
        raise ValueError(
            f"The lm_head's weight is distributed as {placements} over {mesh}. The gated head supports rows "
            "sharded over a mesh of one dimension, (Shard(dim=0),): shard lm_head by columns of its "
            'output ("colwise"), or leave it out of the plan.'
        )
    return VocabularyShard(mesh.get_group(), weight.size(0))


def _called_as(layer: Any, function: Callable[[Tensor], Any], hidden_states: Tensor) -> Any:
    """`function(hidden_states)` as if it were the layer's forward, so that hooks on the layer run.

    FSDP's gather the layer's parameters, and scatter and average their gradients; it finds the gradients by
    the tensors in what is returned, a dict.
    """
    with _forward_of(layer, function):
        return layer(hidden_states)


@contextmanager
def _forward_of(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Have `function` in place of the module's forward."""
    present = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if present is None:
            del module.forward
        else:
            module.forward = present
