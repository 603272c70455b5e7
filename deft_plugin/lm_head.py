"""An lm_head taken apart: which tensors its layer multiplies hidden states with, whatever has been put on it.

A layer is peeled from the outside in: PEFT's `modules_to_save`, a LoRA adapter, trainable tokens, fake
quantisation, a quantised weight. What is left is one product for the core:

    logits = hidden_states @ weight.T + low_rank_hidden @ low_rank_weight.T + bias

Adapters become the second pair, so that the weight is neither copied nor asked for a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional
from transformers import PreTrainedModel

from .ops.shard import VocabularyShard
from .substitution import forward_of, in_mode


@dataclass(frozen=True)
class Projection:
    """What an lm_head makes of hidden states, as tensors.

    Args:
        hidden_states: (..., H), the layer's input after what it does to it first.
        weight: (V, H), or this rank's rows of it.
        bias: (V,) or None.
        low_rank: (..., r) and (V, r), whose product is added; None without an adapter.
        shard: which rows the weight has; None for all of them.
    """

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    shard: VocabularyShard | None = None

    def logits(self) -> Tensor:
        """The layer's logits (..., V), for comparison with its own."""
        weight = self.weight.to(self.hidden_states.dtype)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        logits = functional.linear(self.hidden_states, weight, bias)
        if self.low_rank is not None:
            hidden, weight = self.low_rank
            logits = logits + functional.linear(hidden, weight.to(hidden.dtype)).to(logits.dtype)
        return logits

    def first_rows(self, vocab_size: int) -> Projection:
        """The projection onto the first `vocab_size` tokens, where a model cuts padding off its logits."""
        if self.shard is not None or vocab_size == self.weight.size(0):
            return self
        low_rank = self.low_rank
        return replace(
            self,
            weight=self.weight[:vocab_size],
            bias=None if self.bias is None else self.bias[:vocab_size],
            low_rank=None if low_rank is None else (low_rank[0], low_rank[1][:vocab_size]),
        )


def lm_head_of(model: PreTrainedModel) -> Any:
    """The layer that makes logits: the model's own, or that of its `language_model`; None without one."""
    layer = model.get_output_embeddings()
    part = getattr(model, "language_model", None)
    if layer is None and isinstance(part, PreTrainedModel):
        return part.get_output_embeddings()
    return layer


def check_lm_head(layer: Any) -> None:
    """Raise `ValueError` where the layer cannot be taken apart, as far as that shows without its input."""
    inner = _unwrapped(layer)
    kind = type(inner).__name__
    if _is_trainable_tokens(inner):
        inner = inner.base_layer
    elif hasattr(inner, "base_layer"):
        _check_adapter(inner)
        inner = inner.base_layer
    if inner._forward_pre_hooks and "weight" not in inner._parameters and type(inner) is nn.Linear:
        raise ValueError(
            "The lm_head's weight is made anew by a hook in each forward pass (torch.nn.utils.weight_norm, "
            "spectral_norm or prune), which the gated head does not run: use torch.nn.utils.parametrizations instead, or "
            "make the weight permanent with the matching remove function."
        )
    if not (_is_quantised(inner) or isinstance(inner, nn.Linear) or _is_dense(inner)):
        raise ValueError(
            f"The lm_head is a {kind}; the gated head needs a linear layer: torch.nn.Linear, plain or "
            "quantised, with LoRA or trainable tokens or in PEFT's modules_to_save."
        )


def innermost(layer: Any) -> Any:
    """The layer under all adapters, which has the weight."""
    inner = _unwrapped(layer)
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    return inner


def lm_head_rows(layer: Any) -> int:
    """How many tokens the vocabulary has; an attribute where ZeRO-3 leaves no weight to measure, or it is packed."""
    inner = innermost(layer)
    shard = _deepspeed_shard_of(inner)
    if shard is not None:
        return shard.vocab_size
    # Not `inner.weight`, at which ZeRO-3 would gather it for as long as the layers run.
    weight: Any = inner._parameters.get("weight")
    if type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1:
        # PEFT's copy of a tied lm_head has its two sizes in the wrong places. Under ZeRO-3 no number is left.
        shape = getattr(weight, "ds_shape", weight.shape)
        if len(shape) == 2 and shape[0]:
            return int(shape[0])
    return int(getattr(inner, "out_features", 0) or inner.weight.size(0))


def lm_head_width(layer: Any) -> int:
    """How many logits the layer gives on this rank."""
    inner = innermost(layer)
    shard = _deepspeed_shard_of(inner)
    return lm_head_rows(layer) if shard is None or inner.gather_output else shard.size


def lm_head_device(layer: Any) -> torch.device:
    """Where the layer's logits come to be; the CPU for what is offloaded."""
    inner = innermost(layer)
    # GPTQ's and AWQ's layers have buffers only.
    tensors = (*inner.parameters(), *inner.buffers())
    devices = (tensor.device for tensor in tensors if not tensor.is_meta)
    return next(devices, torch.device("cpu"))


def project_with(
    layer: Any, hidden_states: Tensor, function: Callable[[Projection], dict[str, Any]]
) -> dict[str, Any]:
    """`function` of the layer's projection, called while its parameters are whole.

    FSDP and ZeRO-3 gather parameters in hooks around the modules that hold them, and scatter and average
    their gradients: so `function` runs in the place of those modules' forwards. FSDP finds the gradients
    by the tensors in what is returned, a dict.

    Raises:
        ValueError: the layer is more than a linear one, is offloaded, or distributed in an unknown way.
    """

    # Of what the hooks pass on: ZeRO-3 lets go of parameters when its gradient is there.
    def with_all(hidden_states: Tensor) -> dict[str, Any]:
        if isinstance(hidden_states, DTensor):
            raise ValueError(
                "lm_head is tensor parallel and an FSDP module of its own, whose hooks do not go together "
                "with the gated head. Leave lm_head in the model's own FSDP module: do not call "
                "fully_shard on it."
            )
        return function(projection_of(layer, hidden_states))

    run: Callable[[Tensor], dict[str, Any]] = with_all
    for module in _modules_of(layer):
        if _has_gathering_hooks(module):
            run = _called_as(module, run)
    return run(hidden_states)


def projection_of(layer: Any, hidden_states: Tensor) -> Projection:
    """The tensors of a layer whose parameters are whole. Differentiable in all that trains.

    Raises:
        ValueError: as `project_with`.
    """
    inner = _unwrapped(layer)
    if _is_trainable_tokens(inner):
        return _with_trainable_tokens(inner, hidden_states)
    if hasattr(inner, "base_layer"):
        _check_adapter(inner)
        return _with_lora(inner, hidden_states)
    quantised = _is_quantised(inner)
    weight = _dequantised(inner, hidden_states.dtype) if quantised else inner.weight
    if weight.is_meta:
        raise ValueError(
            "The lm_head's weight is offloaded (device_map), and the gated head reads it directly: give "
            "lm_head a device."
        )
    hidden_states = hidden_states.to(weight.device)
    bias = getattr(inner, "bias", None)
    # Quantisation-aware training: torchao rounds on the way in, with a straight-through gradient.
    if getattr(inner, "activation_fake_quantizer", None) is not None:
        hidden_states = inner.activation_fake_quantizer(hidden_states)
    if getattr(inner, "weight_fake_quantizer", None) is not None:
        weight = inner.weight_fake_quantizer(weight)
    if not isinstance(weight, DTensor):
        return Projection(hidden_states, weight, bias, shard=_deepspeed_shard_of(inner))
    shard = _shard_of(weight)
    bias = bias.to_local() if isinstance(bias, DTensor) else bias
    return Projection(hidden_states, weight.to_local(), bias, shard=shard)


@torch.no_grad()
def check_is_linear(layer: Any, hidden_states: Tensor) -> None:
    """Raise `ValueError` where the layer's own forward gives other logits than its tensors do.

    Args:
        layer: with its parameters whole.
        hidden_states: (..., H), of which a few are compared.
    """
    inner = _unwrapped(layer)
    rows = hidden_states.detach().flatten(0, -2)[:4]
    _check_hooks(inner, rows)
    # A forward on the instance: compressed-tensors', accelerate's. `project_with` puts its own there.
    patched = None if _has_gathering_hooks(inner) else vars(inner).get("forward")
    may_round = patched is not None or _is_quantised(innermost(inner))
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
        or _has_gathering_hooks(inner)
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


def _unwrapped(layer: Any) -> Any:
    """The layer that runs, out of PEFT's `modules_to_save` and `trainable_token_indices`."""
    if hasattr(layer, "token_adapter"):
        return layer.token_adapter
    if not hasattr(layer, "modules_to_save"):
        return layer
    name = layer.active_adapters[0] if layer.active_adapters else None
    if layer.disable_adapters or name not in layer.modules_to_save:
        return layer.original_module
    return layer.modules_to_save[name]


def _is_dense(layer: Any) -> bool:
    """A layer with a matrix (V, H), of another class than nn.Linear; its numbers are compared later."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()


def _is_trainable_tokens(layer: Any) -> bool:
    return hasattr(layer, "trainable_tokens_delta")


def _modules_of(layer: Any) -> list[nn.Module]:
    """The modules whose parameters are read directly, the layer itself first."""
    inner = _unwrapped(layer)
    modules = [layer, inner]
    if _is_trainable_tokens(inner):
        modules += [inner.base_layer]
    elif hasattr(inner, "base_layer"):
        modules += [inner.base_layer, *getattr(inner, "lora_B", {}).values()]
    return list(dict.fromkeys(modules))


def _has_gathering_hooks(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule) or hasattr(module, "ds_id")


def _called_as(
    module: nn.Module, function: Callable[[Tensor], dict[str, Any]]
) -> Callable[[Tensor], dict[str, Any]]:
    """`function` as if it were the module's forward, so that hooks on the module run."""

    def call(hidden_states: Tensor) -> dict[str, Any]:
        with forward_of(module, function):
            result: dict[str, Any] = module(hidden_states)
            return result

    return call


# --- adapters ---


def _check_adapter(layer: Any) -> None:
    kind = type(layer).__name__
    instead = "Remove lm_head from it; to train the head whole, put it into modules_to_save."
    variants = getattr(layer, "lora_variant", {})
    for name in _active_adapters(layer):
        if name in variants:
            variant = type(variants[name]).__name__.removesuffix("Variant").removesuffix("Linear")
            raise ValueError(
                f"The adapter {name!r} on lm_head is {variant}, whose logits are not linear in the hidden "
                f"states with one weight and one low-rank addition: the gated head supports plain LoRA there. {instead}"
            )
    # AdaLoRA's are parameters, with singular values between them.
    is_lora = isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)
    if not is_lora or type(layer).__name__ == "ParamWrapper":
        raise ValueError(
            f"The adapter on lm_head is a {kind} of {type(layer).__module__}: the gated head supports LoRA, "
            f"trainable tokens and modules_to_save there. {instead}"
        )


def _active_adapters(layer: Any) -> list[str]:
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in getattr(layer, "lora_A", {})]


def _with_lora(layer: Any, hidden_states: Tensor) -> Projection:
    """logits = h W^T + s dropout(h) A^T B^T: several adapters lie side by side in A and B."""
    base = projection_of(layer.base_layer, hidden_states)
    bias, parts = base.bias, []
    for name in _active_adapters(layer):
        down, up = layer.lora_A[name], layer.lora_B[name]
        hidden = hidden_states.to(down.weight.device, down.weight.dtype)
        hidden = down(layer.lora_dropout[name](hidden)) * layer.scaling[name]
        parts.append((hidden, up.weight))
        if up.bias is not None:
            added = up.bias * layer.scaling[name]
            bias = added if bias is None else bias + added.to(bias.dtype)
    if not parts:
        return base
    if base.shard is not None:
        raise ValueError(
            "lm_head is tensor parallel and has a LoRA adapter, which the gated head does not support together: "
            "leave lm_head out of one of them."
        )
    hiddens, weights = zip(*parts, strict=True)
    return replace(base, bias=bias, low_rank=(torch.cat(hiddens, -1), torch.cat(weights, 1)))


def _with_trainable_tokens(layer: Any, hidden_states: Tensor) -> Projection:
    """Rows of the weight replaced: an addition of as many columns, h (new - old)^T, each one token's.

    The weight stays as it is: neither a copy of it with other rows nor its gradient is built.
    """
    base = projection_of(layer.base_layer, hidden_states)
    # PEFT's own forward leaves the bias out with the tokens in, and has it without.
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return base
    weight = base.weight
    indices = [index for name in layer.active_adapters for index in layer.token_indices[name]]
    rows = torch.tensor(indices, device=weight.device)
    new = torch.cat([layer.trainable_tokens_delta[name] for name in layer.active_adapters])
    change = new.to(weight) - weight[rows]
    columns = weight.new_zeros(weight.size(0), len(indices))
    columns[rows, torch.arange(len(indices), device=weight.device)] = 1
    hidden = functional.linear(base.hidden_states.to(weight.dtype), change)
    return replace(base, bias=None, low_rank=(hidden, columns))


# --- quantised weights ---


def _is_quantised(layer: Any) -> bool:
    """Whether a linear layer's numbers are another thing than a floating matrix named `weight`."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):  # HQQ's W_q, GPTQ's and AWQ's qweight.
        return hasattr(layer, "in_features") and hasattr(layer, "out_features")
    # Quantised weights are parameters of a class of their own, some with a floating dtype, or 8 bits wide.
    kinds = (nn.Parameter, Tensor, DTensor)
    return type(weight) not in kinds or not weight.is_floating_point() or weight.element_size() < 2


def _dequantised(layer: Any, dtype: torch.dtype) -> Tensor:
    """A quantised weight as a floating one (V, H), made anew in each forward pass.

    Args:
        layer: the one that has it.
        dtype: of the layer's input.
    """
    weight: Any = getattr(layer, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        whole: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    elif kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
        whole = int8_vectorwise_dequant(weight.data, scales)
    elif hasattr(layer, "W_q"):
        whole = layer.dequantize()
    elif hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
        try:
            whole = weight.dequantize()
        except NotImplementedError:  # torchao's with activations quantised.
            return _weight_by_forward(layer, dtype)
    else:
        return _weight_by_forward(layer, dtype)
    return whole.detach()


def _weight_by_forward(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight (V, H) of a linear layer of any class: what its own forward makes of each unit vector.

    That costs as much as the logits of H tokens.
    """
    identity = torch.eye(layer.in_features, dtype=dtype, device=lm_head_device(layer))
    # The class's forward: `project_with` may have put another in the place of the instance's.
    columns: Tensor = type(layer).forward(layer, identity)
    bias = getattr(layer, "bias", None)
    return (columns if bias is None else columns - bias).t()


# --- tensor parallelism ---


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


def _deepspeed_shard_of(layer: Any) -> VocabularyShard | None:
    """The rows that DeepSpeed's tensor parallelism (AutoTP) has left on this rank; None where that is not in use.

    Its layers average nothing and add up their input's gradient, as the gated head does.
    """
    group, sizes = getattr(layer, "mp_group", None), getattr(layer, "_partition_sizes", None)
    if group is None:
        return None
    if sizes is None:
        raise ValueError(
            f"The lm_head is DeepSpeed's {type(layer).__name__}, which does not tell which of its rows are on which rank. Use "
            "DeepSpeed 0.19.8 or later with tensor_parallel, or leave tensor_parallel out."
        )
    shard = VocabularyShard(group, sum(sizes))
    # The same on all ranks, or one of them would wait for those that stop.
    dealt = [
        min(shard.largest_size, max(shard.vocab_size - rank * shard.largest_size, 0))
        for rank in range(len(sizes))
    ]
    if list(sizes) != dealt or layer.weight.size(0) != shard.size:
        raise ValueError(
            f"The lm_head, DeepSpeed's {type(layer).__name__}, has a weight of {tuple(layer.weight.shape)} on this rank, of "
            f"{sum(sizes):,} in parts of {tuple(sizes)}. The gated head supports rows dealt out evenly: a vocabulary "
            f"that {len(sizes)} divides, sharded by the lm_head's output."
        )
    return shard
