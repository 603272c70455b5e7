"""The gate of each objective over the target's probability, as a picture: docs/gates.png.

python scripts/plot_theory.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import typer
from torch import Tensor

from deft_plugin import TokenStatistics, build_objective

VOCAB_SIZE = 150_000
MEAN_PROBABILITY = 0.5
# Okabe and Ito's colours that have contrast on white and on black; axes in a grey that has it too. The
# background is transparent.
ORANGE, BLUE, GREEN, RED, PURPLE = "#e69f00", "#3d94d6", "#009e73", "#d55e00", "#a8488f"
GREY = "#808890"
DASH_DOT_DOT = (0, (5, 1.5, 1.2, 1.5, 1.2, 1.5))


@dataclass(frozen=True)
class Curve:
    """A gate over p, and where its name stands by the line: (p, gate), and its slope in degrees."""

    label: str
    gate: Tensor
    colour: str
    style: Any
    place: tuple[float, float]
    slope: float = 0


def gate_curves(p: Tensor) -> list[Curve]:
    """Gates at the target probabilities p, shape (N,), in (0, 1].

    `deft` looks at the whole distribution: its gate lies between those of a model that spreads the rest
    of its belief over the vocabulary, and of one that has it all on one other token. `eaft` looks at the
    entropy of the k most likely tokens alone, so p bounds it from above.
    """
    undecided = p * p + (1 - p) ** 2 / (VOCAB_SIZE - 1)
    settled = p * p + (1 - p) ** 2

    def gate(name: str, collision: Tensor | None = None, **parameters: object) -> Tensor:
        objective = build_objective(name, parameters)
        return objective.gate(TokenStatistics(p.log(), VOCAB_SIZE, collision=collision))

    eaft = build_objective("eaft")
    k = eaft.top_k or 0
    rest = (1 - p) / (k - 1)
    entropy = -torch.special.xlogy(p, p) - (k - 1) * torch.special.xlogy(rest, rest)
    # A target may be the least likely of the k, or not be among them.
    largest = entropy.where(p > 1 / k, torch.full_like(p, math.log(k)))
    eaft_gate = eaft.gate(TokenStatistics(p.log(), VOCAB_SIZE, top_k_entropy=largest))
    mean = {"scope": "fixed", "mean_probability": MEAN_PROBABILITY}
    return [
        Curve("nll", gate("nll"), GREY, "-", (0.02, 1.025)),
        Curve("deft, the model is undecided", gate("deft", undecided), BLUE, "-", (0.33, 0.925)),
        Curve("cayley", gate("cayley"), GREEN, ":", (0.33, 0.745)),
        Curve(
            "cayley_trans, mean p = 0.5", gate("cayley_trans", **mean), RED, "-.", (0.045, 0.665)
        ),
        Curve(
            "deft, settled on another token", gate("deft", settled), BLUE, "-", (0.225, 0.305), 34
        ),
        Curve("p, dft", gate("p"), ORANGE, "--", (0.42, 0.345)),
        Curve("eaft, at most", eaft_gate, PURPLE, DASH_DOT_DOT, (0.855, 0.29)),
    ]


def plot(path: Path) -> None:
    """Draw `gate_curves` as a PNG at `path`."""
    p = torch.cat([torch.logspace(-6, -3, 100), torch.linspace(0.001, 1, 1000)[1:]]).double()
    curves = gate_curves(p)
    figure, axis = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    by_label = {curve.label: curve.gate for curve in curves}
    band = [gate for label, gate in by_label.items() if label.startswith("deft")]
    axis.fill_between(p, *band, color=BLUE, alpha=0.15, linewidth=0)
    for curve in curves:
        axis.plot(p, curve.gate, linestyle=curve.style, color=curve.colour, linewidth=2)
        axis.text(
            *curve.place,
            curve.label,
            color=curve.colour,
            rotation=curve.slope,
            rotation_mode="anchor",
        )
    axis.set_xlabel("probability p of the target token")
    axis.set_ylabel("gate on the token's gradient")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.09)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(GREY)
    axis.tick_params(colors=GREY)
    for side, spine in axis.spines.items():
        spine.set_color(GREY)
        spine.set_visible(side in ("left", "bottom"))
    axis.grid(color=GREY, alpha=0.25)
    figure.savefig(path, dpi=150, transparent=True)
    plt.close(figure)


def main(
    output: Path = typer.Option(
        Path(__file__).parents[1] / "docs" / "gates.png", help="PNG to write."
    ),
) -> None:
    """Draw the gate of each objective over the target's probability."""
    plot(output)
    print(f"Written to {output}")


if __name__ == "__main__":
    typer.run(main)
