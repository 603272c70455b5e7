"""How well a model knows a task before training, and what was found then: by the paper, and by this project's study."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Regime:
    """How well a model knows a task before training, and what the paper found then (arXiv 2602.11424).

    Args:
        name: the paper's.
        lowest, highest: the mean focus that the paper's models began with.
        task: what the paper trained on.
        finding: its figures for Llama-3.1-8B, in a sentence.
        own_finding: what this project's study found, with the page of the docs that says more; None as long as it has found
            nothing there.
    """

    name: str
    lowest: float
    highest: float
    task: str
    finding: str
    own_finding: str | None = None


REGIMES = (
    Regime(
        "weak prior",
        0.0,
        0.05,
        "FigFont, words drawn with characters",
        "There DEFT (46.3) was well ahead of nll (33.4), and p, which trains only what is believed already, fell "
        "behind the untrained model (14.3 against 30.2; Jaro-Winkler similarity of the answers).",
    ),
    Regime(
        "intermediate prior",
        0.55,
        0.55,
        "medical questions",
        "There all objectives were close together, DEFT (52.0 % right) before Cayley-Trans (51.5), EAFT (51.2), nll "
        "(50.2) and p (49.8), from 22.8 untrained.",
    ),
    Regime(
        "strong prior",
        0.65,
        0.70,
        "mathematics",
        "There the objectives that keep what the model believes won: DEFT 11.4, Cayley-Trans 10.4 and p 10.0, against "
        "6.5 for nll and 6.8 for EAFT (average over 16 samples), from 0.9 untrained.",
        "On a task that a small model knows (mean focus 0.98), with 20 % of the answers corrupted, DEFT was 1.9, Cayley-Trans 2.4 "
        "and p 2.4 points ahead of nll; with clean answers there was no difference (docs/study.md).",
    ),
)


def regime_of(mean_focus: float) -> Regime:
    """The paper's regime whose initial mean focus is nearest."""

    def distance(regime: Regime) -> float:
        return max(regime.lowest - mean_focus, mean_focus - regime.highest, 0.0)

    return min(REGIMES, key=distance)
