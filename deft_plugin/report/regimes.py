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
        own_finding: what this project's study found, with the page of the docs that says more.
    """

    name: str
    lowest: float
    highest: float
    task: str
    finding: str
    own_finding: str


REGIMES = (
    Regime(
        "weak prior",
        0.0,
        0.05,
        "FigFont, words drawn with characters",
        "There DEFT (46.3) was well ahead of nll (33.4), and p, which trains only what is believed already, fell "
        "behind the untrained model (14.3 against 30.2; Jaro-Winkler similarity of the answers).",
        "On FigFont, with a model of 3.5 million parameters (mean focus 0.36 at a mean probability of 0.07), DEFT was level with nll "
        "(-0.2 ± 3.4 points) and p 5.3 ± 3.3 behind; with SmolLM2-135M (0.29 at 0.24) p was 18.9 ± 10.8 behind (docs/study.md).",
    ),
    Regime(
        "intermediate prior",
        0.55,
        0.55,
        "medical questions",
        "There all objectives were close together, DEFT (52.0 % right) before Cayley-Trans (51.5), EAFT (51.2), nll "
        "(50.2) and p (49.8), from 22.8 untrained.",
        "On a task that was new to a model of 3.5 million parameters and on which it was settled wrongly (mean focus 0.45 at a mean probability "
        "of 0.07), nll got 98.4 % right, Cayley-Trans 2.7 ± 1.3 points less, DEFT 12.7 ± 5.9 less, and p learnt next to nothing. On word "
        "problems with SmolLM2-135M (0.38 at 0.29) DEFT and Cayley-Trans were level with nll, and p 17.7 ± 3.4 behind (docs/study.md).",
    ),
    Regime(
        "strong prior",
        0.65,
        0.70,
        "mathematics",
        "There the objectives that keep what the model believes won: DEFT 11.4, Cayley-Trans 10.4 and p 10.0, against "
        "6.5 for nll and 6.8 for EAFT (average over 16 samples), from 0.9 untrained.",
        "On a task that a model of 3.5 million parameters knows (mean focus 0.98) there was no difference with clean answers; with 40 % "
        "of them wrong nll fell from 94.9 to 62.8 %, and DEFT, Cayley-Trans and p stayed within a point of where they began (docs/study.md).",
    ),
)


def regime_of(mean_focus: float) -> Regime:
    """The paper's regime whose initial mean focus is nearest."""

    def distance(regime: Regime) -> float:
        return max(regime.lowest - mean_focus, mean_focus - regime.highest, 0.0)

    return min(REGIMES, key=distance)
