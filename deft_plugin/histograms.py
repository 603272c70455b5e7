"""Histograms over tokens of target probability, focus and gate.

The edges are fixed, so that counts add up over micro-batches, steps and ranks in any order. One set of them is exact on two
axes: in steps of 0.05, which shows where most tokens are, and in powers of ten, which shows those that the gate silences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops import GatedLoss

QUANTITIES = {
    "target_probability": "p of the target",
    "focus": "exponent a (objectives of the deformed-log family)",
    "gate": "factor on a token's gradient",
}
LINEAR_EDGES = tuple(step / 20 for step in range(21))
# A float32 holds p down to 1e-45; below 1e-20 no gradient is left to speak of.
POWERS_OF_TEN = (0.0, *(float(f"1e-{power}") for power in range(20, 0, -1)), 1.0)
EDGES = tuple(sorted({*LINEAR_EDGES, *POWERS_OF_TEN}))
# Of all counts of a forward pass.
SIZE = len(QUANTITIES) * len(EDGES)


@dataclass(frozen=True)
class Histogram:
    """Numbers of tokens by a value of theirs; tokens whose value is NaN are in none of them.

    Args:
        counts: as many as edges. `counts[i]` have a value above `edges[i]` and up to `edges[i + 1]`, the last one above the
            last edge, as gates of some objectives are. The first one has 0 and what is below it, too.
        edges: ascending, from 0 to 1.
    """

    counts: tuple[int, ...]
    edges: tuple[float, ...] = EDGES

    @property
    def total(self) -> int:
        """Number of tokens."""
        return sum(self.counts)

    def linear(self) -> tuple[list[float], list[int]]:
        """Edges in steps of 0.05 and the counts between them. Values above 1, where there are, in a bin up to 1.05."""
        *counts, above = self._between(LINEAR_EDGES)
        return [*LINEAR_EDGES, *([1.05] if above else [])], [*counts, *([above] if above else [])]

    def log10(self) -> tuple[list[float], list[int]]:
        """Edges as powers of ten and the counts between them, below -20 in one down to -21, above 0 in one up to 1."""
        *counts, above = self._between(POWERS_OF_TEN)
        powers = [float(power) for power in range(-21, 1)]
        return [*powers, *([1.0] if above else [])], [*counts, *([above] if above else [])]

    def _between(self, coarser: Sequence[float]) -> list[int]:
        bounds = itertools.pairwise((*coarser, math.inf))
        pairs = [*zip(self.edges, self.counts, strict=True)]
        return [sum(count for edge, count in pairs if low <= edge < high) for low, high in bounds]


def upper_edges() -> Tensor:
    """The upper end of every count, (len(EDGES),)."""
    return torch.tensor((*EDGES[1:], math.inf), dtype=torch.float64)


def count_up_to(edges: Tensor, gated: GatedLoss, rows: int | None, dtype: torch.dtype) -> Tensor:
    """How many scored tokens have at most the value of each edge, for every quantity in turn: (SIZE,).

    A comparison and a sum, on any device without atomic additions and without waiting for it.

    Args:
        edges: `upper_edges`, on the device.
        gated: of one forward pass.
        rows: count its first rows alone.
        dtype: of the counts.
    """
    p = gated.log_p.exp()
    focus = torch.full_like(p, math.nan) if gated.focus is None else gated.focus
    values = torch.stack((p, focus, gated.gate))[:, :rows]
    # NaN is below no edge.
    values = values.masked_fill(~gated.mask[:rows], math.nan).reshape(len(QUANTITIES), 1, -1)
    return (values <= edges[:, None]).sum(-1, dtype=dtype).flatten()


def histograms_of(counts: Sequence[float]) -> dict[str, Histogram]:
    """The histograms by name from the sums of `count_up_to`; those without any token are left out."""
    histograms = {}
    for index, name in enumerate(QUANTITIES):
        up_to = counts[index * len(EDGES) : (index + 1) * len(EDGES)]
        bins = (round(upper - lower) for lower, upper in itertools.pairwise((0, *up_to)))
        histogram = Histogram(tuple(bins))
        if histogram.total:
            histograms[name] = histogram
    return histograms
