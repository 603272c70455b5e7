"""The model's own forward, run with stand-ins: it does everything but build logits.

For as long as a gated forward runs, the lm_head's place in the model is taken by a module that keeps the hidden
states it is handed and returns a few numbers in place of logits, and the place of the loss function by one
that scores those hidden states. Whatever else the forward does, it does itself: images and audio,
multipliers, layers between backbone and lm_head, the auxiliary loss of a mixture of experts.

What the forward does to logits is measured, not read off the configuration: in the first forward the
stand-in returns known numbers over 25 powers of two, and what has become of them says scale, softcap and how many
columns are left, or that it is nothing of the kind.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from .lm_head import lm_head_device, lm_head_of, lm_head_rows, lm_head_width
from .ops import GatedLoss
from .ops.projection import LogitsTransform
from .substitution import attribute_of, child_of

ADVICE = "Use deft_plugin.gated_loss on its logits instead."
_PROBE_TOKENS = 4
_SMALLEST_POWER, _LARGEST_POWER = -10, 15


class UnknownForwardError(ValueError):
    """A model's forward treats its logits or labels in a way that the gated head does not know."""

    def __init__(self, model: nn.Module, what: str) -> None:
        super().__init__(f"{type(model).__name__}'s own forward {what}. {ADVICE}")


class OwnForward:
    """Runs a model's own forward with stand-ins in it, and knows what has been measured of it.

    Attributes:
        transform: what the forward does to its logits.
        vocab_size: how many of the lm_head's columns it keeps.
        takes_labels: whether it leaves the loss to `loss_function` when it is given labels. Otherwise it is
            run without them, and a mixture's auxiliary loss is added here.
    """

    def __init__(self) -> None:
        self.transform = LogitsTransform()
        self.vocab_size = 0
        self.takes_labels = True
        self._measured_on: tuple[Any, ...] = ()
        self._places: list[str] = []
        self._options: dict[str, Any] = {}
        self._stand_in = _StandIn()
        self._loss = _Loss()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has an lm_head of its own.
        return {**vars(self), "_stand_in": _StandIn(), "_loss": _Loss()}

    def called_lm_head(self) -> bool:
        """Whether the forward that ran last, or failed, got as far as its lm_head."""
        return bool(self._stand_in.hidden_states)

    def run(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        arguments: Mapping[str, Any],
        labels: Tensor,
        score: Callable[[Any, Tensor, bool], GatedLoss],
    ) -> tuple[Any, Tensor, GatedLoss]:
        """The forward's output, its loss () with `score`'s in the place of cross-entropy, and the score itself.

        Args:
            model: whose forward it is.
            forward: its own one, bound.
            arguments: of the forward, without labels.
            labels: (batch, sequence).
            score: of the lm_head, the hidden states that it was given, and whether the layer is still to be
                compared with its weight. Called when `transform` and `vocab_size` are known.

        Raises:
            UnknownForwardError: it does not call its lm_head once, or does something with its logits or its loss
                that is not known.
        """
        # Looked up on each call: PEFT and FSDP may have replaced it, or put an adapter on it.
        layer = lm_head_of(model)
        state = _state_of(model, layer)
        measuring = state != self._measured_on
        if measuring:
            self._places = _places_of(model, layer)
            self._options = _options_of(forward)
            loss_functions = [part.loss_function for part in _around(model, self._places)]
        stand_in, loss = self._stand_in, self._loss
        width, device = lm_head_width(layer), lm_head_device(layer)
        stand_in.begin(
            layer,
            _probe_of(width, device) if measuring else torch.zeros(1, 1, width, device=device),
        )
        gated: GatedLoss | None = None
        refusal: Exception | None = None

        def score_once(logits: Any) -> GatedLoss:
            nonlocal gated, refusal
            try:
                if measuring:
                    self.transform, self.vocab_size = _measure(model, stand_in.logits, logits)
                    if loss.logits is not None:
                        _check_loss_functions(model, loss_functions, logits)
                gated = score(layer, stand_in.handed(model), measuring)
            except Exception as error:
                refusal = error
                raise
            return gated

        loss.begin(score_once)
        takes_labels = self.takes_labels
        arguments = {**arguments, **self._options}
        try:
            with standing_in(model, self._places, stand_in, loss):
                if takes_labels:
                    output = forward(**arguments, labels=labels)
                if not takes_labels or not stand_in.hidden_states:
                    # It has a loss of its own, on hidden states.
                    takes_labels = False
                    output = forward(**arguments)
            own_logits = output.logits
            if gated is not None:
                total = output.loss
                if measuring:
                    _check_same_logits(model, own_logits, loss.logits)
                    _check_remainder(model, total, gated.loss, output)
            else:
                if takes_labels and measuring:
                    _check_remainder(model, output.loss, _cross_entropy(own_logits, labels), output)
                takes_labels = False
                total = _with_auxiliary_loss(model, score_once(own_logits).loss, output)
        except Exception as error:
            known = error is refusal or isinstance(error, UnknownForwardError)
            if known or not stand_in.hidden_states:
                raise
            raise UnknownForwardError(
                model,
                "does not have the form backbone, lm_head, logits, loss that the gated head replaces "
                f"({type(error).__name__}: {error})",
            ) from error
        finally:
            loss.begin(None)
        self._measured_on, self.takes_labels = state, takes_labels
        assert gated is not None
        return output, total, gated


class _StandIn(nn.Module):
    """In the lm_head's place: keeps what it is given, returns `logits`, and else passes for the layer.

    One object for all forwards: torch.compile traces a module that is another each time anew.
    """

    def begin(self, layer: Any, logits: Tensor) -> None:
        """Stand in for `layer`, and return `logits`."""
        # Not a child and not a buffer: they are no part of the model.
        self.__dict__.update(layer=layer, logits=logits, hidden_states=[])

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._keep(hidden_states)
        # Unsloth's forwards scale logits in place.
        logits: Tensor = self.logits.clone()
        return logits

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep(self, hidden_states: Tensor) -> None:
        self.hidden_states.append(hidden_states)

    def handed(self, model: nn.Module) -> Tensor:
        """The hidden states that the lm_head was given."""
        if len(self.hidden_states) != 1:
            times = len(self.hidden_states)
            raise UnknownForwardError(model, f"calls its lm_head {times} times in one pass")
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
        self._score: Callable[[Any], GatedLoss] | None = None

    def begin(self, score: Callable[[Any], GatedLoss] | None) -> None:
        """Score with this from now on, or with nothing."""
        self.logits, self._score = None, score

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, logits: Any, *args: Any, **kwargs: Any) -> Tensor:
        assert self._score is not None
        self.logits = logits
        return self._score(logits).loss


def _places_of(model: PreTrainedModel, layer: nn.Module) -> list[str]:
    """The names under which `layer` is in `model`; {} is no answer, since something must take its place."""
    modules = model.named_modules(remove_duplicate=False)
    found = [name for name, module in modules if module is layer]
    if not found:
        raise UnknownForwardError(model, "has an lm_head that is no part of the model")
    return found


def _options_of(forward: Callable[..., Any]) -> dict[str, Any]:
    """Arguments with which it calls its lm_head: in training, Liger's forwards have a loss on hidden states else."""
    return {"skip_logits": False} if "skip_logits" in inspect.signature(forward).parameters else {}


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
        for config in {id(part): part for part in _configs_of(model)}.values():
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
        for config in _configs_of(model)
        for value in vars(config).values()
        if isinstance(value, int | float)
    )
    return type(layer), len(_modules_inside(layer)), numbers


def _configs_of(model: PreTrainedModel) -> list[Any]:
    return [model.config, model.config.get_text_config()]


def _modules_inside(layer: Any) -> list[Any]:
    return list(layer.modules()) if isinstance(layer, nn.Module) else []


# --- what is measured ---


def _probe_of(width: int, device: torch.device) -> Tensor:
    """Numbers (1, 4, V) of both signs over all magnitudes that matter, in no order."""
    generator = torch.Generator().manual_seed(0)
    count = _PROBE_TOKENS * width
    powers = torch.linspace(_SMALLEST_POWER, _LARGEST_POWER, count)
    signs = torch.randint(2, (count,), generator=generator) * 2 - 1
    numbers = (powers.exp2() * signs)[torch.randperm(count, generator=generator)]
    return numbers.reshape(1, _PROBE_TOKENS, width).to(device)


def _measure(model: nn.Module, probe: Tensor, logits: Any) -> tuple[LogitsTransform, int]:
    """Scale, softcap and number of columns by which the forward has made `logits` of `probe`, (1, 4, V).

    Raises:
        UnknownForwardError: it has done something else.
    """
    if not isinstance(logits, Tensor) or logits.shape[:-1] != probe.shape[:-1]:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnknownForwardError(
            model, f"makes {shape} of logits of shape {tuple(probe.shape)} from its lm_head"
        )
    vocab_size = min(logits.size(-1), probe.size(-1))
    given = probe[..., :vocab_size].double().cpu().flatten()
    found = logits[..., :vocab_size].detach().double().cpu().flatten()
    smallest, largest = int(given.abs().argmin()), int(given.abs().argmax())
    scale = (found[smallest] / given[smallest]).item()
    if abs(scale - 1) < 0.005:  # What bfloat16 may make of a number.
        scale = 1.0
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


def _check_loss_functions(model: nn.Module, functions: list[Any], logits: Tensor) -> None:
    """Refuse a loss function that is not the next token's cross-entropy, on what became of the probe."""
    labels = _probe_labels(logits)
    for function in functions:
        if function is not ForCausalLMLoss:
            own = function(logits=logits, labels=labels, vocab_size=logits.size(-1))
            _check_same_loss(model, own, _cross_entropy(logits, labels))


def _check_same_logits(model: nn.Module, returned: Any, scored: Any) -> None:
    """Refuse a forward that returns other logits than it gives to its loss function."""
    if isinstance(returned, Tensor) and isinstance(scored, Tensor):
        same_shape = returned.shape == scored.shape
        if not same_shape or not torch.allclose(returned.float(), scored.float(), rtol=0.01):
            raise UnknownForwardError(
                model, "returns another logits than those that its loss is of"
            )


def _check_same_loss(model: nn.Module, own: Any, expected: Tensor) -> None:
    found = own.float().item() if isinstance(own, Tensor) else math.nan
    if not abs(found - expected.item()) <= 1e-3 * max(abs(expected.item()), 1e-6):
        raise UnknownForwardError(
            model,
            f"gives another loss than cross-entropy on the next token: {found:.6g} for {expected.item():.6g}",
        )


def _check_remainder(model: PreTrainedModel, loss: Any, counted: Tensor, output: Any) -> None:
    """Refuse a forward whose loss is more than what is counted and a coefficient times its auxiliary loss."""
    if isinstance(loss, Tensor) and loss.isnan() and counted.isnan():
        return  # Of a weight that is NaN, which trainers look for by name.
    aux_loss = getattr(output, "aux_loss", None)
    if not isinstance(aux_loss, Tensor) or not isinstance(loss, Tensor):
        _check_same_loss(model, loss, counted.detach().float())
        return
    remainder = (loss - counted).item()
    tolerance = 1e-5 * abs(counted.item())
    for coefficient in (0.0, *_numbers_of(model)):
        expected = coefficient * aux_loss.item()
        if abs(remainder - expected) <= tolerance + 1e-3 * abs(expected):
            return
    raise UnknownForwardError(
        model,
        f"adds {remainder:.3g} to its loss, which no coefficient of its configuration makes of its auxiliary loss "
        f"({aux_loss.item():.3g})",
    )


def _with_auxiliary_loss(model: PreTrainedModel, loss: Tensor, output: Any) -> Tensor:
    """`loss` with a mixture's load-balancing loss, for a forward that was not given labels."""
    aux_loss = getattr(output, "aux_loss", None)
    if not isinstance(aux_loss, Tensor):
        return loss
    coefficient = getattr(model, "router_aux_loss_coef", None)
    if coefficient is None:
        coefficient = model.config.router_aux_loss_coef
    return loss + float(coefficient) * aux_loss.to(loss.device)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """What a causal LM's loss is: of (1, n, V) and (1, n)."""
    targets = labels[:, 1:].flatten().to(logits.device)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets).detach()


def _probe_labels(logits: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = logits.size(-1)
    return torch.randint(size, (1, _PROBE_TOKENS), generator=generator).to(logits.device)


def ordinary_tokens(model: PreTrainedModel) -> Tensor:
    """(1, 4) ids that the configuration does not name, as it does an image's or the end's."""
    # A model may have more embeddings than logits, for images, or fewer.
    embeddings: Any = model.get_input_embeddings()
    sizes = (getattr(embeddings, "num_embeddings", None), lm_head_rows(lm_head_of(model)))
    size = min(size for size in sizes if size)
    named = {int(number) for number in _numbers_of(model) if float(number).is_integer()}
    # From the middle, where ordinary tokens are.
    order = (token for half in (range(size // 2, size), range(size // 2)) for token in half)
    ids = [token for token, _ in zip((t for t in order if t not in named), range(4), strict=False)]
    ids = (ids or [0]) * _PROBE_TOKENS
    return torch.tensor([ids[:_PROBE_TOKENS]], device=next(embeddings.parameters()).device)


def _numbers_of(model: PreTrainedModel) -> list[float]:
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
