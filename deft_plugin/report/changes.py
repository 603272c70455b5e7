"""What training has changed: the same tokens under two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .analysis import BAND_LABELS, band_of, means_by
from .measurement import TokenTable

# A token counts as learned where its probability rose by more than this, as forgotten where it fell by more.
MARKED_CHANGE = 0.1


@dataclass(frozen=True)
class BandChange:
    """The tokens of one band of probability before training.

    Args:
        band: its label.
        tokens: how many.
        learned, forgotten: shares of them whose probability rose, or fell, by more than `MARKED_CHANGE`.
        probability_change: mean change of probability.
        nll_change: mean change of -log p, in nats.
    """

    band: str
    tokens: int
    learned: float | None
    forgotten: float | None
    probability_change: float | None
    nll_change: float | None


@dataclass(frozen=True)
class Changes:
    """All tokens, and by band.

    Args:
        learned, forgotten: shares of all tokens.
        became_first, stopped_being_first: shares of all tokens that became the model's first choice, or were it.
        bands: in order of confidence.
    """

    learned: float
    forgotten: float
    became_first: float
    stopped_being_first: float
    bands: list[BandChange]


def changes_between(before: TokenTable, after: TokenTable) -> Changes:
    """Compare two tables of the same tokens."""
    assert torch.equal(before.target, after.target)
    p_change = after.p.double() - before.p.double()
    nll_change = before.statistics.log_p.double() - after.statistics.log_p.double()
    learned, forgotten = (p_change > MARKED_CHANGE), (p_change < -MARKED_CHANGE)
    bands, count = band_of(before.p), len(BAND_LABELS)
    columns = (
        means_by(learned, bands, count),
        means_by(forgotten, bands, count),
        means_by(p_change, bands, count),
        means_by(nll_change, bands, count),
    )
    was_first, is_first = before.rank == 1, after.rank == 1
    return Changes(
        learned=float(learned.double().mean()),
        forgotten=float(forgotten.double().mean()),
        became_first=float((is_first & ~was_first).double().mean()),
        stopped_being_first=float((was_first & ~is_first).double().mean()),
        bands=[
            BandChange(label, int((bands == band).sum()), *(column[band] for column in columns))
            for band, label in enumerate(BAND_LABELS)
        ],
    )
