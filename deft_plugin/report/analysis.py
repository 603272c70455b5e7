"""Where the data stands for the model, and what each objective would do with it: numbers, no drawing.

The gradient of a token's loss in its logits is gate * (p - e_y), so that its length is gate * sqrt(C2 - 2 p + 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..metrics import CLOSED_GATE
from ..objectives import build_objective, objective_names
from ..objectives.registry import summary_of
from .measurement import TokenTable
from .regimes import regime_of

Numbers = npt.NDArray[np.float64]

# Bands of the target's probability: where each begins, and the end of the last.
BAND_EDGES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
BAND_LABELS = (
    "below 1\u00a0%",
    "1–10\u00a0%",
    "10–50\u00a0%",
    "50–90\u00a0%",
    "90–99\u00a0%",
    "from 99\u00a0%",
)
SHARE_BINS = 40


@dataclass(frozen=True)
class Histogram:
    """Shares of the tokens in bins of equal width.

    Args:
        edges: n + 1 of them.
        shares: n; their sum is 1.
    """

    edges: list[float]
    shares: list[float]

    @classmethod
    def of(cls, values: Tensor, low: float, high: float, bins: int = SHARE_BINS) -> Histogram:
        """Values outside count in the first or last bin."""
        array = as_array(values).clip(low, high)
        counts, edges = np.histogram(array, bins=bins, range=(low, high))
        return cls(edges.tolist(), (counts / max(counts.sum(), 1)).tolist())


@dataclass(frozen=True)
class Standing:
    """What the model makes of the data before training; means are over tokens.

    Args:
        tokens: how many are trained on.
        nll: mean negative log-likelihood, in nats.
        perplexity: exp(nll).
        accuracy: share of tokens that are the model's first choice.
        mean_probability, median_probability: of the target.
        mean_focus: mean of C2, the sum of squared probabilities.
        mean_focus_error: its standard error, rows being drawn at random; None with one row.
        mean_entropy: mean Shannon entropy of the model's distribution, in nats.
        regime: the paper's nearest, by the mean focus.
        band_shares: of the tokens, by the target's probability.
        probability, focus, entropy: distributions.
    """

    tokens: int
    nll: float
    perplexity: float
    accuracy: float
    mean_probability: float
    median_probability: float
    mean_focus: float
    mean_focus_error: float | None
    mean_entropy: float
    regime: str
    band_shares: list[float]
    probability: Histogram
    focus: Histogram
    entropy: Histogram


@dataclass(frozen=True)
class Effect:
    """What an objective would do with the data in the first step.

    Args:
        objective: its name.
        description: the first line of its documentation.
        mean_gate: mean factor on a token's gradient.
        closed_share: share of tokens with a gate below `CLOSED_GATE`.
        closed_share_of_nll: how much of nll's gradient those tokens hold.
        gate_by_band: mean gate of the tokens in each band of probability; None where there are none.
        gradient_by_band: share of the summed lengths of the tokens' gradients in each band; None where all are 0.
        coupled: whether its gate depends on the mean of p, here that over the sample.
    """

    objective: str
    description: str
    mean_gate: float
    closed_share: float
    closed_share_of_nll: float | None
    gate_by_band: list[float | None]
    gradient_by_band: list[float] | None
    coupled: bool


@dataclass(frozen=True)
class GradientMap:
    """Mean length of the tokens' gradients, by the target's probability and the entropy.

    Args:
        probability_edges: P + 1.
        entropy_edges: E + 1, in nats.
        means: by objective, E rows of P numbers; None where there is no token.
    """

    probability_edges: list[float]
    entropy_edges: list[float]
    means: dict[str, list[list[float | None]]]


def standing_of(table: TokenTable) -> Standing:
    """The distributions and means of the tokens."""
    p, log_p = table.p.double(), table.statistics.log_p.double()
    nll = float(-log_p.mean())
    mean_focus = float(table.collision.double().mean())
    highest_entropy = max(float(table.entropy.max()), 0.1)
    bands = band_of(table.p)
    return Standing(
        tokens=len(table),
        nll=nll,
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        accuracy=float((table.rank == 1).double().mean()),
        mean_probability=float(p.mean()),
        median_probability=float(p.median()),
        mean_focus=mean_focus,
        mean_focus_error=error_of_mean(table.collision, table.row),
        mean_entropy=float(table.entropy.double().mean()),
        regime=regime_of(mean_focus).name,
        band_shares=[float((bands == band).double().mean()) for band in range(len(BAND_LABELS))],
        probability=Histogram.of(table.p, 0, 1),
        focus=Histogram.of(table.collision, 0, 1),
        entropy=Histogram.of(table.entropy, 0, highest_entropy),
    )


def gates_of(table: TokenTable, names: Sequence[str]) -> dict[str, Tensor]:
    """The gate of each token under each objective, (N,).

    Raises:
        ValueError: an unknown objective, one that needs a statistic which was not computed, or one whose gate is
            not finite.
    """
    gates = {name: table.gate(build_objective(name)) for name in names}
    for name, gate in gates.items():
        damaged = int((~gate.isfinite()).sum())
        if damaged:
            raise ValueError(
                f"--objectives {name!r}: its gate is not finite at {damaged:,} of {len(table):,} tokens."
            )
    return gates


def effects_of(table: TokenTable, gates: Mapping[str, Tensor]) -> list[Effect]:
    """What each objective would do."""
    bands = band_of(table.p)
    error_norm = table.error_norm.double()
    effects = []
    for name, gate in gates.items():
        objective = build_objective(name)
        closed = gate < CLOSED_GATE
        effects.append(
            Effect(
                objective=name,
                description=summary_of(type(objective)),
                mean_gate=float(gate.double().mean()),
                closed_share=float(closed.double().mean()),
                closed_share_of_nll=_share(error_norm[closed].sum(), error_norm.sum()),
                gate_by_band=means_by(gate, bands, len(BAND_LABELS)),
                gradient_by_band=shares_by(gradient_lengths(table, gate), bands, len(BAND_LABELS)),
                coupled=objective.step_scope is not None,
            )
        )
    return effects


def gradient_lengths(table: TokenTable, gate: Tensor) -> Tensor:
    """Length of each token's gradient in its logits, (N,)."""
    return gate.double() * table.error_norm.double()


def gradient_map_of(
    table: TokenTable, gates: Mapping[str, Tensor], columns: int = 20, rows: int = 16
) -> GradientMap:
    """Mean gradients over a grid of probability and entropy."""
    highest = max(float(table.entropy.max()), 0.1)
    p_edges = np.linspace(0, 1, columns + 1)
    entropy_edges = np.linspace(0, highest, rows + 1)
    place = as_array(table.p), as_array(table.entropy)
    counts, *_ = np.histogram2d(*place, bins=(p_edges, entropy_edges))
    means = {}
    for name, gate in gates.items():
        weights = as_array(gradient_lengths(table, gate))
        sums, *_ = np.histogram2d(*place, bins=(p_edges, entropy_edges), weights=weights)
        means[name] = [
            [float(total / count) if count else None for total, count in zip(*row, strict=True)]
            for row in zip(sums.T, counts.T, strict=True)
        ]
    return GradientMap(p_edges.tolist(), entropy_edges.tolist(), means)


def band_of(p: Tensor) -> Tensor:
    """Which band of `BAND_EDGES` each probability is in; (N,) int64."""
    return torch.bucketize(p, torch.tensor(BAND_EDGES[1:-1], dtype=p.dtype), right=True)


def means_by(values: Tensor, groups: Tensor, count: int) -> list[float | None]:
    """The mean of each group's values; None where it has none."""
    return [
        float(values[groups == group].double().mean()) if (groups == group).any() else None
        for group in range(count)
    ]


def shares_by(values: Tensor, groups: Tensor, count: int) -> list[float] | None:
    """Each group's share of the sum; None where that is 0."""
    total = values.double().sum()
    if not total > 0:
        return None
    return [float(values[groups == group].double().sum() / total) for group in range(count)]


def error_of_mean(values: Tensor, rows: Tensor) -> float | None:
    """Standard error of a mean over the tokens of rows that were drawn; tokens of a row go together."""
    values = values.double()
    _, row = rows.unique(return_inverse=True)
    count = int(row.max()) + 1
    if count < 2:
        return None
    deviations = torch.zeros(count, dtype=torch.float64).index_add(0, row, values - values.mean())
    return float((deviations.square().sum() * count / (count - 1)).sqrt() / len(values))


def groups_of_equal_gates(gates: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Objectives by the first of those with the same gates, which have the same gradients (`p` and `dft`)."""
    groups: dict[str, list[str]] = {}
    for name, gate in gates.items():
        same = (first for first in groups if torch.equal(gates[first], gate))
        groups.setdefault(next(same, name), []).append(name)
    return groups


def check_objectives(names: Sequence[str], shown: str) -> list[str]:
    """The objectives to look at, the one that texts are shaded by among them, each once.

    Raises:
        ValueError: an unknown name, or none.
    """
    known = objective_names()
    if not names:
        raise ValueError(f"--objectives names none. Choices: {', '.join(known)}.")
    for option, name in [*(("--objectives", name) for name in names), ("--objective", shown)]:
        if name not in known:
            raise ValueError(f"{option} {name!r} is unknown. Choices: {', '.join(known)}.")
    return list(dict.fromkeys([*names, shown]))


def as_array(tensor: Tensor) -> Numbers:
    """For numpy and matplotlib."""
    array: Numbers = tensor.detach().double().cpu().numpy()
    return array


def _share(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole > 0 else None
