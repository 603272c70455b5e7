"""A gated head: a Hugging Face causal LM's forward with labels returns an objective's loss, never logits.

head = add_gated_head(model, "deft")
output = model(input_ids=..., labels=...)        # output.loss, output.gate, ...; no logits
model.generate(...)                              # without labels the model is unchanged
head.remove()
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .objectives import Objective, build_objective
from .ops import PATHS, GatedLoss, linear_gated_loss
from .ops.projection import LogitsTransform, project

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
        path, tile_rows: as in `linear_gated_loss`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        with_entropy: bool,
        path: str,
        tile_rows: int | None,
        output_class: type[GatedCausalLMOutput],
    ) -> None:
        self.model = model
        self.objective = objective
        self.with_entropy = with_entropy
        self.path = path
        self.tile_rows = tile_rows
        self.output_class = output_class
        self.transform = logits_transform(model)
        self._observer: Callable[[GatedLoss], None] | None = None
        self._original_forward = model.forward
        # None where the forward is the class's own, so that removal leaves no trace.
        self._instance_forward = model.__dict__.get("forward")
        self._forward_parameters = list(inspect.signature(type(model).forward).parameters)[1:]

    def install(self) -> None:
        """Replace the model's forward."""
        head = self

        # generate() checks its keyword arguments against the forward's signature.
        @functools.wraps(type(self.model).forward)
        def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            return head.forward(*args, **kwargs)

        self.model.forward = types.MethodType(forward, self.model)
        setattr(self.model, _ATTRIBUTE, self)

    def remove(self) -> None:
        """Give the model its own forward back.

        Raises:
            RuntimeError: something else (accelerate, another patch) has wrapped the forward since; the
                gated head then stays, and has to be removed after that.
        """
        current = self.model.__dict__.get("forward")
        if getattr(self.model, _ATTRIBUTE, None) is not self:
            raise RuntimeError("This gated head is not on its model any more.")
        closure = getattr(getattr(current, "__func__", None), "__closure__", None) or ()
        if not any(cell.cell_contents is self for cell in closure):
            raise RuntimeError(
                "The model's forward was wrapped after the gated head was added. Undo that first, for "
                "example with accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
            )
        if self._instance_forward is None:
            del self.model.forward
        else:
            self.model.forward = self._instance_forward
        delattr(self.model, _ATTRIBUTE)

    @contextmanager
    def observed_by(self, observer: Callable[[GatedLoss], None]) -> Iterator[None]:
        """Call `observer` with the `GatedLoss` of every gated forward in this context."""
        previous, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = previous

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward: gated where labels are given, the original otherwise."""
        kwargs = {**dict(zip(self._forward_parameters, args, strict=False)), **kwargs}
        # TRL asks for the fused head that this one replaces.
        kwargs.pop("fused_lm_head", None)
        if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
            return self._original_forward(**kwargs)
        return self._gated_forward(**kwargs)

    def _gated_forward(
        self,
        *,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> GatedCausalLMOutput | tuple[Any, ...]:
        if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(
                f"logits_to_keep={logits_to_keep!r} together with labels is not supported by the gated "
                "head, which builds no logits: leave it out, or call the model without labels."
            )
        config = self.model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        kwargs.update(use_cache=False, return_dict=True)
        # Looked up on each call: PEFT and FSDP may have replaced them.
        backbone = self.model.base_model(**kwargs)
        hidden_states = backbone.last_hidden_state
        if shift_labels is None:
            assert labels is not None
            hidden_states, targets = hidden_states[:, :-1], labels[:, 1:]
        else:
            targets = shift_labels
        weight, bias = head_parameters(self.model)
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
            bias = bias.full_tensor() if isinstance(bias, DTensor) else bias
        gated = linear_gated_loss(
            hidden_states.to(weight.device),
            weight,
            targets.to(weight.device),
            self.objective,
            bias=bias,
            logit_scale=self.transform.scale,
            softcap=self.transform.softcap,
            num_items_in_batch=num_items_in_batch,
            with_entropy=self.with_entropy,
            path=self.path,  # type: ignore[arg-type]
            tile_rows=self.tile_rows,
        )
        if self._observer is not None:
            self._observer(gated)
        loss, aux_loss = gated.loss, None
        if kwargs.get("output_router_logits"):
            aux_loss = _auxiliary_loss(backbone.router_logits, config, kwargs.get("attention_mask"))
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss.to(loss.device)
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
        return output.to_tuple() if return_dict is False else output


def add_gated_head(
    model: PreTrainedModel,
    objective: str | Objective = "deft",
    parameters: Mapping[str, Any] | None = None,
    *,
    with_entropy: bool = False,
    path: str = "auto",
    tile_rows: int | None = None,
    output_class: type[GatedCausalLMOutput] = GatedCausalLMOutput,
) -> GatedHead:
    """Give a Hugging Face causal LM a gated head, in place.

    From then on `model(..., labels=...)` (or `shift_labels=`) runs the backbone, scores the labelled
    positions with `linear_gated_loss` and returns a `GatedCausalLMOutput`; without labels the forward is the
    original one. A PEFT model's base model is patched, so adapters and prompt tuning work as before.
    Add the head before the model is wrapped for distributed training.

    Before it installs itself, the head compares its logits with those of the model's own forward on random
    hidden states, so that an architecture which treats logits in a way unknown here is refused.

    Args:
        model: a `PreTrainedModel` with an lm_head, or a PEFT model of one.
        objective: a registered name or an `Objective`.
        parameters: the named objective's parameters.
        with_entropy: also compute the Shannon entropy of every scored position.
        path, tile_rows: as in `linear_gated_loss`.
        output_class: class of the output, for adapters that need other names on it.

    Raises:
        ValueError: a bad objective or parameter; a model without a plain linear lm_head (an adapter on it,
            quantised, none); a multi-modal model; logits that differ from the model's own.
    """
    objective = build_objective(objective, parameters)
    if path not in PATHS:
        raise ValueError(f"path={path!r} is not valid. Choices: {', '.join(map(repr, PATHS))}.")
    model = causal_lm_of(model)
    check_model(model)
    present = getattr(model, _ATTRIBUTE, None)
    if present is not None:
        raise ValueError(
            f"The model has a gated head with {present.objective!r} already. Set its `objective`, or "
            "remove() it first."
        )
    head = GatedHead(model, objective, with_entropy, path, tile_rows, output_class)
    _check_against_own_forward(model, head.transform)
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
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise ValueError(
            f"{name} is not a Hugging Face causal LM: it has no get_output_embeddings()."
        )
    if model.config.get_text_config() is not model.config:
        raise ValueError(
            f"{name} is multi-modal: the gated head supports text-only causal LMs. Load the language "
            "model alone, or use TRL's own loss_type."
        )
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{name} has no lm_head: a causal LM is needed.")
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
    if not layer.weight.is_floating_point():
        raise ValueError(
            f"The lm_head is quantised ({kind}, {layer.weight.dtype}). Keep it out of quantisation: "
            'BitsAndBytesConfig(..., llm_int8_skip_modules=["lm_head"]).'
        )


def head_parameters(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """The lm_head's weight (V, H) and its bias (V,) or None."""
    layer = model.get_output_embeddings()
    return layer.weight, getattr(layer, "bias", None)


def logits_transform(model: PreTrainedModel) -> LogitsTransform:
    """What the model does to its logits, read off its configuration."""
    config = model.config.get_text_config()

    def value(name: str) -> float | None:
        return getattr(config, name, None)

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


def _auxiliary_loss(router_logits: Any, config: Any, attention_mask: Tensor | None) -> Tensor:
    # The function that every mixture of experts in transformers shares.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(
        router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
    )


def _check_against_own_forward(model: PreTrainedModel, transform: LogitsTransform) -> None:
    """Compare logits on random hidden states that stand in for the backbone's."""
    weight, bias = head_parameters(model)
    if weight.device.type == "meta" or weight.numel() == 0 or isinstance(weight, DTensor):
        return  # Not loaded, or partitioned by ZeRO-3 or FSDP.
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(1, 2, weight.size(1), generator=generator)
    spread = weight.detach().float().std().item() * weight.size(1) ** 0.5
    # Logits of some tens, where a softcap bends them.
    hidden_states = (hidden_states * (20 / spread if spread > 0 else 1.0)).to(weight)
    stand_in = _BackboneOutput(last_hidden_state=hidden_states)
    backbone = model.base_model
    present = backbone.__dict__.get("forward")
    backbone.forward = lambda *args, **kwargs: stand_in
    try:
        with torch.no_grad():
            input_ids = torch.zeros(1, 2, dtype=torch.long, device=weight.device)
            own = model(input_ids=input_ids, use_cache=False).logits.float()
            ours = project(hidden_states, weight, bias, transform).float()
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__}: its forward does not have the form backbone, lm_head, logits that "
            f"the gated head replaces ({type(error).__name__}: {error}). Use deft_plugin.gated_loss on its "
            "logits instead."
        ) from error
    finally:
        if present is None:
            del backbone.forward
        else:
            backbone.forward = present
    difference = (own - ours).abs().max().item()
    if own.shape != ours.shape or not difference <= 0.02 * max(ours.abs().max().item(), 1e-6):
        raise ValueError(
            f"{type(model).__name__} treats its logits in a way that the gated head does not know: they "
            f"differ from softcap(scale * lm_head(hidden_states)) by {difference:.3g}, with "
            f"{transform}. Use deft_plugin.gated_loss on its logits instead."
        )


@dataclass
class _BackboneOutput(ModelOutput):
    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    router_logits: Any = None
