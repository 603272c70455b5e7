"""What cannot have a gated head, and says so before any training: models, and lm_heads that are not linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .adapters import check_adapter, is_trainable_tokens
from .lm_head import innermost, lm_head_device, lm_head_of, unwrapped
from .quantised_weight import is_quantised
from .substitution import in_mode
from .taken_apart import has_gathering_hooks, projection_of


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
    _check_lm_head(layer)


def _check_lm_head(layer: Any) -> None:
    """Raise `ValueError` where the layer cannot be taken apart, as far as that shows without its input."""
    inner = unwrapped(layer)
    kind = type(inner).__name__
    if is_trainable_tokens(inner):
        inner = inner.base_layer
    elif hasattr(inner, "base_layer"):
        check_adapter(inner)
        inner = inner.base_layer
    if inner._forward_pre_hooks and "weight" not in inner._parameters and type(inner) is nn.Linear:
        raise ValueError(
            "The lm_head's weight is made anew by a hook in each forward pass (torch.nn.utils.weight_norm, "
            "spectral_norm or prune), which the gated head does not run: use torch.nn.utils.parametrizations instead, or "
            "make the weight permanent with the matching remove function."
        )
    if not (is_quantised(inner) or isinstance(inner, nn.Linear) or _is_dense(inner)):
        raise ValueError(
            f"The lm_head is a {kind}; the gated head needs a linear layer: torch.nn.Linear, plain or "
            "quantised, with LoRA or trainable tokens or in PEFT's modules_to_save."
        )


def _is_dense(layer: Any) -> bool:
    """A layer with a matrix (V, H), of another class than nn.Linear; its numbers are compared later."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()


def check_finite(model: PreTrainedModel) -> None:
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


@torch.no_grad()
def check_is_linear(layer: Any, hidden_states: Tensor) -> None:
    """Raise `ValueError` where the layer's own forward gives other logits than its tensors do.

    Args:
        layer: with its parameters whole.
        hidden_states: (..., H), of which a few are compared.
    """
    inner = unwrapped(layer)
    rows = hidden_states.detach().flatten(0, -2)[:4]
    _check_hooks(inner, rows)
    # A forward on the instance: compressed-tensors', accelerate's. `project_with` puts its own there.
    patched = None if has_gathering_hooks(inner) else vars(inner).get("forward")
    may_round = patched is not None or is_quantised(innermost(inner))
    if type(inner).forward is nn.Linear.forward and not may_round:
        return
    with in_mode(inner, training=False):
        projection = projection_of(inner, rows)
        rows = rows.to(projection.weight.device)
        own = type(inner).forward(inner, rows) if patched is None else patched(rows)
    expected, shard = projection.logits(), projection.shard
    if shard is not None and own.size(-1) == shard.vocab_size:
        own = own[..., shard.first : shard.first + shard.size]
    difference = (own.to(expected.device).float() - expected.float()).abs().max().item()
    # bfloat16 is good to 1 %, hidden states rounded to FP8 to 5 %.
    tolerance = 0.1 if may_round else 0.02
    if not difference <= tolerance * max(expected.abs().max().item(), 1e-6):
        raise ValueError(
            f"The lm_head, a {type(inner).__name__}, gives other logits than its weight does: they differ by "
            f"{difference:.3g}. The gated head needs a linear layer; use deft_plugin.gated_loss on the model's "
            "logits instead."
        )


def _check_hooks(inner: Any, rows: Tensor) -> None:
    """Refuse hooks that change what goes into the layer or comes out of it; others may look on."""
    hooks = [*inner._forward_pre_hooks.values(), *inner._forward_hooks.values()]
    # FSDP's, ZeRO-3's and tensor parallelism's are none of these.
    if (
        not hooks
        or has_gathering_hooks(inner)
        or isinstance(getattr(inner, "weight", None), DTensor)
    ):
        return
    with in_mode(inner, training=False):
        rows = rows.to(lm_head_device(inner))
        difference = (inner(rows) - inner.forward(rows)).abs().max().item()
    if difference != 0:
        names = ", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks)
        raise ValueError(
            f"The lm_head has a hook that changes its logits ({names}), by {difference:.3g}, and the gated head does not "
            "run it: remove it, or do the same in a layer of its own before the lm_head."
        )
