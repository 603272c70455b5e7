"""What an objective is: a loss per token, the gate on its gradient, and typed parameters.

Every objective of the family has the same gradient in the logits z, with p = softmax(z), target y and
everything but log p_y detached:

    dL/dz = gate * (p - e_y),        gate = -dL/d(log p_y)

so an objective is a function of log p_y and a few detached statistics, and never sees the vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Union

import torch
from torch import Tensor

from .statistics import OPTIONAL_STATISTICS, TokenStatistics


@dataclass(frozen=True)
class Objective:
    """A token loss. Subclasses are frozen dataclasses: their fields are the objective's parameters.

    Define `loss`; `gate` follows by autograd unless a closed form is given beside it. Both must be
    deterministic functions of their arguments: they are evaluated apart, and for each tile.
    """

    name: ClassVar[str] = ""
    # Optional statistics that `loss` reads: any of "collision", "entropy", "top_k_entropy".
    needs: ClassVar[tuple[str, ...]] = ()
    # Whether one token's loss depends on which other tokens are in the micro-batch. A False that is not true
    # gives a trainable lm_head wrong gradients; a True costs it a fourth matrix product.
    couples_tokens: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # A closed form that was written for another loss is not this one's gate.
        if "loss" in vars(cls) and "gate" not in vars(cls):
            cls.gate = Objective.gate  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _checked(self.name, field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
        self.validate()

    def validate(self) -> None:
        """Raise `ValueError` for a parameter outside its range."""

    def loss(self, log_p: Tensor, statistics: TokenStatistics) -> Tensor:
        """Per-token loss, differentiable in `log_p` alone. Shapes (N,) in, (N,) out."""
        raise NotImplementedError(f"{type(self).__name__} does not define `loss`.")

    def gate(self, statistics: TokenStatistics) -> Tensor:
        """-dL/d(log p_y), shape (N,), detached."""
        with torch.inference_mode(False), torch.enable_grad():
            # A copy, since autograd does not take tensors made in inference mode.
            statistics = statistics.clone()
            log_p = statistics.log_p.detach().requires_grad_()
            loss = self.loss(log_p, statistics)
            if not isinstance(loss, Tensor):
                raise ValueError(
                    f"Objective {self.name!r} must return a tensor and returned a "
                    f"{type(loss).__name__}."
                )
            if loss.shape != log_p.shape:
                raise ValueError(
                    f"Objective {self.name!r} must return one loss per token, of shape "
                    f"{tuple(log_p.shape)}, and returned {tuple(loss.shape)}."
                )
            if not loss.requires_grad:
                raise ValueError(
                    f"Objective {self.name!r} returned a loss that does not depend on its argument "
                    "`log_p`, so it has no gradient. (`statistics.log_p` is detached.)"
                )
            (gradient,) = torch.autograd.grad(loss.sum(), log_p)
        return -gradient

    def focus(self, statistics: TokenStatistics) -> Tensor | None:
        """The exponent a of the deformed logarithm, shape (N,); None for losses of another form."""
        return None

    @property
    def step_scope(self) -> str | None:
        """Where the loss needs the mean of p over the optimizer step: "global" for this one, "ema" for a
        running mean of those before; None where it needs none. A trainer gives it with `at_mean`."""
        return None

    def at_mean(self, mean: float | None) -> Objective:
        """The objective for a step with this mean of p; None for that of each micro-batch."""
        return self

    @property
    def top_k(self) -> int | None:
        """How many of the largest logits `statistics.top_k_entropy` looks at."""
        return None

    def require(self, field: str, condition: bool, expected: str) -> None:
        """Raise `ValueError` naming the objective, the field, its value and what is valid."""
        if not condition:
            raise ValueError(
                f"Objective {self.name!r}: parameter {field!r} is {getattr(self, field)!r}; "
                f"it must be {expected}."
            )


def deformed_log_loss(log_p: Tensor, focus: Tensor) -> Tensor:
    """L_a(p) = (1 - p^a) / a, the q-logarithm loss of index q = 1 - a; its limit at a = 0 is -log p.

    Args:
        log_p: log-probabilities, any shape, values in [-inf, 0].
        focus: a >= 0, broadcastable to `log_p`.

    Source: arXiv 2602.11424, the deformed-log family. Written with expm1, since 1 - exp(x) loses the
    loss of a confident token, and with the first two terms of its series where a * log p is so small
    that the third is below the working precision: no epsilon is added to a.
    """
    exponent = _power_exponent(log_p, focus)
    near_zero = exponent.abs() < math.sqrt(torch.finfo(log_p.dtype).eps)
    # Each branch sees harmless numbers where it is not taken, or its gradient there would be NaN.
    divisor = torch.where(near_zero, torch.ones_like(exponent), focus)
    small_exponent = torch.where(near_zero, exponent, torch.zeros_like(exponent))
    series = -log_p * (1 + small_exponent / 2)
    return torch.where(near_zero, series, -torch.expm1(exponent) / divisor)


def power_gate(log_p: Tensor, focus: Tensor) -> Tensor:
    """p^a, the gate of `deformed_log_loss`; 1 at a = 0 whatever p."""
    return _power_exponent(log_p, focus).exp()


def _power_exponent(log_p: Tensor, focus: Tensor) -> Tensor:
    """a * log p, with 0 * -inf = 0: the power p^0 is 1 also at p = 0."""
    return torch.where(focus == 0, torch.zeros_like(log_p), focus * log_p)


@dataclass(frozen=True)
class FocusObjective(Objective):
    """An objective of the deformed-log family: define `focus`, the exponent a of each token."""

    def loss(self, log_p: Tensor, statistics: TokenStatistics) -> Tensor:
        return deformed_log_loss(log_p, self._detached_focus(statistics))

    def gate(self, statistics: TokenStatistics) -> Tensor:
        return power_gate(statistics.log_p, self._detached_focus(statistics))

    def _detached_focus(self, statistics: TokenStatistics) -> Tensor:
        focus = self.focus(statistics)
        assert focus is not None, f"{type(self).__name__} does not define `focus`."
        return focus.detach()


@dataclass(frozen=True)
class WeightedObjective(Objective):
    """Weighted negative log-likelihood, -w log p with w detached: define `weight`."""

    def weight(self, statistics: TokenStatistics) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define `weight`.")

    def loss(self, log_p: Tensor, statistics: TokenStatistics) -> Tensor:
        weight = self.weight(statistics).detach()
        # A weight of 0 at log p = -inf is a loss of 0, the limit of -p log p.
        return torch.where(weight == 0, torch.zeros_like(log_p), -weight * log_p)

    def gate(self, statistics: TokenStatistics) -> Tensor:
        return self.weight(statistics).detach()


def _checked(objective: str, field: str, value: Any, annotation: Any) -> Any:
    """`value` as the annotated type, or a `ValueError` which says what the parameter takes."""
    options = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (Union, types.UnionType)
        else (annotation,)
    )
    for option in options:
        if option in (None, type(None)) and value is None:
            return None
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is Any or (option in (bool, str) and isinstance(value, option)):
            return value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if option is int and is_number and value == int(value if math.isfinite(value) else 0):
            return int(value)
        if option is float and is_number:
            return float(value)
    expected = " or ".join(describe_type(option) for option in options)
    hint = ""
    if _is_number(value) and any(option in (int, float) for option in options):
        hint = " YAML reads 1e-3 as text: write 0.001 or 1.0e-3."
    raise ValueError(
        f"Objective {objective!r}: parameter {field!r} is {value!r}; it must be {expected}.{hint}"
    )


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def describe_type(annotation: Any) -> str:
    """What a parameter of this type takes, in words."""
    if annotation in (None, type(None)):
        return "None"
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(annotation))
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(
        annotation, str(annotation)
    )


def check_needs(needs: tuple[str, ...]) -> tuple[str, ...]:
    """`needs` as a tuple of known statistics, or a `ValueError` that lists them."""
    needs = (needs,) if isinstance(needs, str) else tuple(needs)
    unknown = [name for name in needs if name not in OPTIONAL_STATISTICS]
    if unknown:
        raise ValueError(
            f"needs={unknown!r} is not a token statistic. Valid choices: "
            f"{', '.join(OPTIONAL_STATISTICS)}. (log_p, is_top1 and vocab_size are always there.)"
        )
    return needs
