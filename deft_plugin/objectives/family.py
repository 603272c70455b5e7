"""The built-in objectives. p is the target's probability, a the focus, H an entropy.

Each is exact: no epsilon is added anywhere. Sources are named by arXiv number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import FocusObjective, WeightedObjective
from .registry import register
from .statistics import TokenStatistics


@register("nll")
@dataclass(frozen=True)
class NegativeLogLikelihood(FocusObjective):
    """-log p; gate 1. The family's end a = 0: full weight on every token (coverage)."""

    couples_tokens: ClassVar[bool] = False

    def focus(self, statistics: TokenStatistics) -> Tensor:
        return torch.zeros_like(statistics.log_p)


@register("p")
@dataclass(frozen=True)
class LinearProbability(FocusObjective):
    """1 - p; gate p. The family's end a = 1: only tokens already believed in move (sharpening)."""

    couples_tokens: ClassVar[bool] = False

    def focus(self, statistics: TokenStatistics) -> Tensor:
        return torch.ones_like(statistics.log_p)


@register("alpha")
@dataclass(frozen=True)
class FixedFocus(FocusObjective):
    """(1 - p^a) / a; gate p^a, with one focus for every token.

    Args:
        a: the focus, >= 0. 0 is `nll`, 1 is `p`.
    """

    couples_tokens: ClassVar[bool] = False
    a: float = 0.5

    def validate(self) -> None:
        self.require("a", math.isfinite(self.a) and self.a >= 0, "a finite number >= 0")

    def focus(self, statistics: TokenStatistics) -> Tensor:
        return torch.full_like(statistics.log_p, self.a)


@register("dft")
@dataclass(frozen=True)
class DynamicFineTuning(WeightedObjective):
    """-stop_gradient(p) log p; gate p (arXiv 2508.05629). The gradient of `p` under another loss."""

    couples_tokens: ClassVar[bool] = False

    def weight(self, statistics: TokenStatistics) -> Tensor:
        return statistics.p


@register("eaft")
@dataclass(frozen=True)
class EntropyAdaptive(WeightedObjective):
    """-w log p; gate w, an entropy of the model's distribution (arXiv 2601.02151).

    Args:
        entropy: "top_k": w = (H_k / normalizer)^exponent with H_k the entropy of the k largest
            probabilities, renormalised; "full": w = (H / log V)^exponent.
        k: number of probabilities for "top_k", at least 2.
        normalizer: divisor of H_k, in nats. The reference uses 3.0, which is log 20 rounded.
        exponent: >= 0; 0 gives `nll`.
    """

    couples_tokens: ClassVar[bool] = False
    entropy: Literal["top_k", "full"] = "top_k"
    k: int = 20
    normalizer: float = 3.0
    exponent: float = 1.0

    def validate(self) -> None:
        self.require("k", self.k >= 2, "an integer >= 2")
        self.require(
            "normalizer", math.isfinite(self.normalizer) and self.normalizer > 0, "a number > 0"
        )
        self.require(
            "exponent", math.isfinite(self.exponent) and self.exponent >= 0, "a number >= 0"
        )

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("top_k_entropy",) if self.entropy == "top_k" else ("entropy",)

    @property
    def top_k(self) -> int | None:
        return self.k if self.entropy == "top_k" else None

    def weight(self, statistics: TokenStatistics) -> Tensor:
        if self.entropy == "top_k":
            return (statistics.top_k_entropy / self.normalizer) ** self.exponent  # type: ignore[operator]
        return (statistics.entropy / math.log(max(statistics.vocab_size, 2))) ** self.exponent  # type: ignore[operator]


@register("cayley")
@dataclass(frozen=True)
class Cayley(FocusObjective):
    """a = c(p) = p / (2 - p), the Cayley transform of the uncertainty 1 - p (arXiv 2602.11424).

    From a = 0 (nll) for a token the model does not believe in to a = 1 (1 - p) for one it is sure of.
    """

    couples_tokens: ClassVar[bool] = False

    def focus(self, statistics: TokenStatistics) -> Tensor:
        return _cayley_transform(statistics.p)


@register("cayley_trans")
@dataclass(frozen=True)
class CayleyTrans(FocusObjective):
    """a = f + (1 - f) c(p), f = floor_coefficient * mean p, as the authors train (arXiv 2602.11424).

    Args:
        floor_coefficient: in [0, 1].
        scope: where the mean of p in f comes from. "micro_batch": the valid tokens of one forward
            pass on one rank, as in the authors' code; the loss then depends on batch size,
            packing and the number of ranks. "global": all valid tokens of the optimizer step on all
            ranks, exactly, for an extra forward pass over each step of more than one micro-batch.
            "ema": a running mean of that over the steps before, saved in checkpoints. "fixed":
            `mean_probability`. "auto": "ema" in the TRL and Axolotl trainers, which provide the mean
            (`at_mean`), and "micro_batch" elsewhere, where one call is all that is known of the step.
        mean_probability: in [0, 1]; the mean of p to use with scope "fixed", or that scope "ema" begins
            with (by default the first step's own).
        decay: weight of the past in the running mean of scope "ema", in [0, 1); by default 0.9.
        minimum: lower bound of a, in [0, 1].
    """

    floor_coefficient: float = 0.5
    scope: Literal["auto", "ema", "global", "micro_batch", "fixed"] = "auto"
    mean_probability: float | None = None
    decay: float | None = None
    minimum: float = 0.001

    def validate(self) -> None:
        self.require("floor_coefficient", 0 <= self.floor_coefficient <= 1, "in [0, 1]")
        self.require("minimum", 0 <= self.minimum <= 1, "in [0, 1]")
        mean, decay = self.mean_probability, self.decay
        if self.scope == "fixed" or (self.scope == "ema" and mean is not None):
            self.require(
                "mean_probability",
                mean is not None and 0 <= mean <= 1,
                f"a number in [0, 1] when scope is {self.scope!r}",
            )
        else:
            self.require(
                "mean_probability",
                mean is None,
                "left out unless you set scope to 'fixed' or 'ema', which use it",
            )
        if self.scope == "ema":
            self.require("decay", decay is None or 0 <= decay < 1, "in [0, 1)")
        else:
            self.require(
                "decay", decay is None, "left out unless you set scope to 'ema', which uses it"
            )

    @property
    def couples_tokens(self) -> bool:  # type: ignore[override]
        return self.scope != "fixed"

    @property
    def step_scope(self) -> str | None:
        return {"auto": "ema", "ema": "ema", "global": "global"}.get(self.scope)

    def at_mean(self, mean: float | None) -> CayleyTrans:
        return replace(
            self,
            scope="micro_batch" if mean is None else "fixed",
            mean_probability=mean,
            decay=None,
        )

    def focus(self, statistics: TokenStatistics) -> Tensor:
        if self.scope in ("global", "ema"):
            raise ValueError(
                f"Objective {self.name!r}: scope={self.scope!r} needs the mean over the whole optimizer "
                "step, which the TRL and Axolotl trainers provide. Here, use at_mean(mean), or scope "
                "'auto', 'micro_batch' or 'fixed'."
            )
        p = statistics.p
        mean = p.mean() if self.mean_probability is None else self.mean_probability
        floor = self.floor_coefficient * mean
        return (floor + (1 - floor) * _cayley_transform(p)).clamp(self.minimum, 1.0)


@register("deft")
@dataclass(frozen=True)
class DEFT(FocusObjective):
    """a = C2 = sum_v p_v^2, the model's own concentration (arXiv 2602.11424).

    No parameter: the focus is near 0 (nll) where the model spreads its belief and near 1 (1 - p) where
    it is settled, and it needs no epsilon, since 1/V <= a <= 1.
    """

    couples_tokens: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("collision",)

    def focus(self, statistics: TokenStatistics) -> Tensor:
        assert statistics.collision is not None
        return statistics.collision


def _cayley_transform(p: Tensor) -> Tensor:
    """c(p) = (1 - u) / (1 + u) for the uncertainty u = 1 - p."""
    return p / (2 - p)
