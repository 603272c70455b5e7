"""What a model's own forward does between its lm_head and its loss, found out with known numbers for logits.

The numbers lie over 25 powers of two: what has become of them says scale, softcap and how many columns are left. The
graph of what is made of them says whether parameters come in, and the gradient of the loss whether it is
cross-entropy's. What is nothing of the kind is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from .lm_head import lm_head_of, lm_head_rows, lm_head_width
from .ops.projection import LogitsTransform

ADVICE = "Use deft_plugin.gated_loss on its logits instead."
# Of the probe, and of the batch that a forward is tried on: two rows, since a loss may be a mean of means.
PROBE_SHAPE = (2, 4)
_SMALLEST_POWER, _LARGEST_POWER = -10, 15


class UnknownForwardError(ValueError):
    """A model's forward treats its logits or labels in a way that the gated head does not know."""

    def __init__(self, model: nn.Module, what: str) -> None:
        super().__init__(f"{type(model).__name__}'s own forward {what}. {ADVICE}")


def probe_of(shape: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Numbers (*shape, V) of both signs over all magnitudes that matter, in no order; they ask for a gradient."""
    generator = torch.Generator().manual_seed(0)
    count = math.prod(shape) * width
    powers = torch.linspace(_SMALLEST_POWER, _LARGEST_POWER, count)
    signs = torch.randint(2, (count,), generator=generator) * 2 - 1
    numbers = (powers.exp2() * signs)[torch.randperm(count, generator=generator)]
    probe = numbers.reshape(*shape, width).to(device)
    return probe if torch.is_inference_mode_enabled() else probe.requires_grad_()


def measure(model: nn.Module, probe: Tensor, logits: Any) -> tuple[LogitsTransform, int]:
    """Scale, softcap and number of columns by which the forward has made `logits` of `probe`.

    Raises:
        UnknownForwardError: it has done something else.
    """
    if not isinstance(logits, Tensor) or logits.shape[:-1] != probe.shape[:-1]:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnknownForwardError(
            model, f"makes {shape} of logits of shape {tuple(probe.shape)} from its lm_head"
        )
    _check_no_parameters(model, probe, logits)
    vocab_size = min(logits.size(-1), probe.size(-1))
    if (logits[..., vocab_size:] > -1e30).any():
        raise UnknownForwardError(
            model,
            f"gives {logits.size(-1)} logits, {logits.size(-1) - vocab_size} of them not its lm_head's",
        )
    given = probe[..., :vocab_size].detach().double().cpu().flatten()
    found = logits[..., :vocab_size].detach().double().cpu().flatten()
    # Below every softcap that is one; the median, since bfloat16 rounds each number by up to 0.4 %.
    small = given.abs() <= given.abs().quantile(1 / 8)
    scale = (found[small] / given[small]).median().item()
    if abs(scale - 1) < 1e-3:
        scale = 1.0
    largest = int(given.abs().argmax())
    softcap = None
    if found[largest].abs() < abs(scale) * given[largest].abs() / 2:
        softcap = found[largest].abs().item()
    if not math.isfinite(scale) or scale == 0 or softcap == 0:
        raise UnknownForwardError(
            model, "gives another logits than its lm_head's, scaled or capped"
        )
    transform = LogitsTransform(scale, softcap)
    expected = transform(given)
    error = ((found - expected) / expected).abs().max().item()
    if not error <= 0.02:
        raise UnknownForwardError(
            model,
            f"gives another logits than its lm_head's, scaled and capped: with {transform} it differs by {error:.3g} "
            "of their size",
        )
    return transform, vocab_size


def _check_no_parameters(model: nn.Module, probe: Tensor, logits: Tensor) -> None:
    """Refuse what depends on more than the lm_head's logits: the parameters in it would not train."""
    for leaf in _leaves_of(logits):
        if leaf is not probe:
            names = [name for name, parameter in model.named_parameters() if parameter is leaf]
            raise UnknownForwardError(
                model,
                f"computes its logits with {names[0] if names else 'a tensor'} after its lm_head, which would get no "
                "gradient",
            )


def _leaves_of(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that ask for a gradient and that `tensor` was computed from."""
    functions, seen = [tensor.grad_fn], set()
    while functions:
        function: Any = functions.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            yield function.variable
        functions += [following for following, _ in function.next_functions]


def check_loss_functions(model: PreTrainedModel, functions: list[Any], logits: Tensor) -> None:
    """Refuse a loss function that is not the next token's cross-entropy, on logits of ordinary size."""
    functions = [function for function in functions if function is not ForCausalLMLoss]
    if not functions:
        return
    vocab_size, layer = logits.size(-1), lm_head_of(model)
    generator = torch.Generator().manual_seed(2)
    ordinary = torch.randn(2, 16, vocab_size, generator=generator).to(logits.device)
    if lm_head_width(layer) != lm_head_rows(layer):
        # A loss of the ranks' logits together adds log 2 where all have the same: little beside large numbers.
        ordinary *= 4096
    labels = torch.randint(vocab_size, (2, 16), generator=generator)
    labels[-1, -6:] = -100
    # A weight of its own, if any token has one, is the end's.
    special = {int(n) for n in numbers_of(model) if float(n).is_integer() and 0 <= n < vocab_size}
    chosen = torch.tensor(sorted(special)[:15], dtype=torch.int64)
    labels[0, 1 : 1 + len(chosen)] = chosen
    for function in functions:
        own = function(logits=ordinary, labels=labels.to(logits.device), vocab_size=vocab_size)
        _check_same_loss(model, own, cross_entropy(ordinary, labels))


def check_same_logits(model: nn.Module, returned: Any, scored: Any) -> None:
    """Refuse a forward that returns other logits than it gives to its loss function."""
    if isinstance(returned, Tensor) and isinstance(scored, Tensor):
        same_shape = returned.shape == scored.shape
        if not same_shape or not torch.allclose(returned.float(), scored.float(), rtol=0.01):
            raise UnknownForwardError(
                model, "returns another logits than those that its loss is of"
            )


def check_loss(
    model: PreTrainedModel, loss: Any, counted: Tensor, output: Any, probe: Tensor
) -> None:
    """Refuse a forward whose loss is more than what is counted and a coefficient times its auxiliary loss.

    Args:
        model: whose forward it is.
        loss: the forward's.
        counted: what of it is known: the score's in the place of cross-entropy, or the cross-entropy of what became
            of the probe.
        output: the forward's.
        probe: the numbers in the place of logits; the two losses have the same gradient in them.
    """
    if isinstance(loss, Tensor) and loss.isnan() and counted.isnan():
        return  # Of a weight that is NaN, which trainers look for by name.
    auxiliary_coefficient(model, loss, counted, output)
    _check_same_gradient(model, loss, counted, probe)


def auxiliary_coefficient(
    model: PreTrainedModel, loss: Any, counted: Tensor, output: Any
) -> float | None:
    """The coefficient with which a loss () has the output's auxiliary loss beside what is counted; None without one.

    Raises:
        UnknownForwardError: the loss is something else.
    """
    aux_loss = getattr(output, "aux_loss", None)
    if not isinstance(aux_loss, Tensor) or not isinstance(loss, Tensor):
        _check_same_loss(model, loss, counted)
        return None
    remainder = (loss - counted).item()
    candidates = (0.0, *numbers_of(model))
    coefficient = min(candidates, key=lambda number: abs(remainder - number * aux_loss.item()))
    expected = coefficient * aux_loss.item()
    if not abs(remainder - expected) <= 1e-5 * abs(counted.item()) + 1e-3 * abs(expected):
        raise UnknownForwardError(
            model,
            f"adds {remainder:.3g} to its loss, which no coefficient of its configuration makes of its auxiliary loss "
            f"({aux_loss.item():.3g})",
        )
    return coefficient


def drops_masked_labels(
    model: nn.Module, output: Any, labels: Tensor, mask: Tensor, coefficient: float | None
) -> bool:
    """Whether the output's loss is that of the labels (b, n) where `mask` is not 0, rather than that of all.

    Raises:
        UnknownForwardError: it is neither.
    """
    added = 0.0 if coefficient is None else coefficient * output.aux_loss
    losses = [
        cross_entropy(output.logits, counted) + added
        for counted in (labels, labels.masked_fill(mask == 0, -100))
    ]
    for dropped, loss in enumerate(losses):
        if _is_same_loss(output.loss, loss):
            return bool(dropped)
    raise UnknownForwardError(model, "has a loss that depends on attention_mask in an unknown way")


def _check_same_gradient(model: nn.Module, loss: Tensor, counted: Tensor, probe: Tensor) -> None:
    found, expected = _gradient(loss, probe), _gradient(counted, probe)
    if not (found - expected).norm() <= 0.02 * expected.norm():
        raise UnknownForwardError(
            model,
            "has a loss whose gradient in its logits is not that of cross-entropy on the next token",
        )


def _gradient(loss: Tensor, probe: Tensor) -> Tensor:
    """Of a loss in the probe; 0 where it has none."""
    gradient = None
    if loss.requires_grad and probe.requires_grad:
        (gradient,) = torch.autograd.grad(loss, probe, retain_graph=True, allow_unused=True)
    return torch.zeros_like(probe) if gradient is None else gradient


def _is_same_loss(own: Any, expected: Tensor) -> bool:
    """Whether a loss () is the expected one but for rounding."""
    found = own.float().item() if isinstance(own, Tensor) else math.nan
    return abs(found - expected.item()) <= 5e-4 * max(abs(expected.item()), 1e-6)


def _check_same_loss(model: nn.Module, own: Any, expected: Tensor) -> None:
    if not _is_same_loss(own, expected):
        found = own.float().item() if isinstance(own, Tensor) else math.nan
        raise UnknownForwardError(
            model,
            f"gives another loss than cross-entropy on the next token: {found:.6g} for {expected.item():.6g}",
        )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """What a causal LM's loss is: of (b, n, V) and (b, n)."""
    targets = labels[:, 1:].flatten().to(logits.device)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets)


def ordinary_tokens(model: PreTrainedModel) -> Tensor:
    """(2, 4) ids that the configuration does not name, as it does an image's or the end's."""
    # A model may have more embeddings than logits, for images, or fewer.
    embeddings: Any = model.get_input_embeddings()
    sizes = (getattr(embeddings, "num_embeddings", None), lm_head_rows(lm_head_of(model)))
    size = min(size for size in sizes if size)
    named = {int(number) for number in numbers_of(model) if float(number).is_integer()}
    count = math.prod(PROBE_SHAPE)
    # From the middle, where ordinary tokens are.
    order = (token for half in (range(size // 2, size), range(size // 2)) for token in half)
    unnamed = (token for token in order if token not in named)
    ids = [token for token, _ in zip(unnamed, range(count), strict=False)] or [0]
    ids = (ids * count)[:count]
    device = next(embeddings.parameters()).device
    return torch.tensor(ids, device=device).reshape(PROBE_SHAPE)


def numbers_of(model: PreTrainedModel) -> list[float]:
    """All numbers in the model's configuration and its parts, and on the model itself."""
    numbers: list[float] = []

    def collect(value: Any, depth: int) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            numbers.append(value)
        elif isinstance(value, Mapping) and depth:
            for part in value.values():
                collect(part, depth - 1)
        elif isinstance(value, PretrainedConfig) and depth:
            collect(vars(value), depth - 1)

    collect(model.config, 8)
    collect({name: value for name, value in vars(model).items() if not name.startswith("_")}, 1)
    return numbers
