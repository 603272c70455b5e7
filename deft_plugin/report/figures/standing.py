"""Where the data stands, and what each objective would do with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from ..analysis import BAND_LABELS, Effect, GradientMap, Histogram, Standing, as_array
from ..measurement import TokenTable
from ..regimes import REGIMES
from .dress import Dress, axes_of, literal, many_axes

# Always the same, so that an objective is found again in the next figure.
_PLACES = ("deft", "cayley_trans", "p", "eaft", "nll", "cayley", "dft", "alpha")


def regimes_figure(standing: Standing) -> Callable[[Dress], Figure]:
    """The mean focus on a scale with the paper's."""

    def draw(dress: Dress) -> Figure:
        figure, axis = axes_of(8.6, 1.9)
        axis.set_xlim(0, 1)
        axis.set_ylim(-1, 2)
        axis.grid(False)
        axis.yaxis.set_visible(False)
        axis.spines["left"].set_visible(False)
        # Rows from below: the regimes' names, their bars, your data's marker, its label. What moves shares no row with a name.
        for regime, colour in zip(REGIMES, _ordered(dress, len(REGIMES)), strict=True):
            low, high = regime.lowest, max(regime.highest, regime.lowest + 0.012)
            axis.fill_between([low, high], 0, 0.8, color=colour, linewidth=0)
            # The intermediate one stands close to the strong one.
            at, side = (high, "right") if regime.name.startswith("inter") else (low, "left")
            axis.text(
                at, -0.45, f"paper: {regime.name}", ha=side, va="center", fontsize=9, color=dress.faint
            )  # fmt: skip
        mean = standing.mean_focus
        axis.plot([mean, mean], [0, 1.05], color=dress.series[1], linewidth=2)
        axis.plot([mean], [1.05], marker="v", color=dress.series[1], markersize=10, clip_on=False)
        edge = "left" if mean < 0.15 else "right" if mean > 0.85 else "center"
        axis.text(
            mean, 1.45, f"your data: {mean:.2f}", ha=edge, fontsize=11, fontweight="bold", color=dress.series[1]
        )  # fmt: skip
        axis.set_xlabel(
            "mean focus before training: the sum of squared probabilities, from spread out (0) to settled (1)"
        )
        return figure

    return draw


def distributions_figure(standing: Standing) -> Callable[[Dress], Figure]:
    """Probability, focus and entropy of the tokens."""
    panels = (
        (
            "Probability of the target",
            "probability",
            standing.probability,
            standing.mean_probability,
        ),
        ("Focus", "sum of squared probabilities", standing.focus, standing.mean_focus),
        ("Entropy", "nats", standing.entropy, standing.mean_entropy),
    )

    def draw(dress: Dress) -> Figure:
        figure, axes = many_axes(9.6, 2.9, 1, 3)
        for axis, (title, label, histogram, mean) in zip(axes, panels, strict=True):
            _bars(axis, histogram, dress.series[0])
            axis.axvline(mean, color=dress.series[1], linewidth=2)
            axis.set_title(f"{title}, mean {mean:.2f}")
            axis.set_xlabel(label)
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes[0].set_ylabel("share of tokens")
        return figure

    return draw


def shares_figure(standing: Standing, effects: Sequence[Effect]) -> Callable[[Dress], Figure]:
    """Who moves the model: tokens and gradients by band of probability."""
    rows = [("tokens", standing.band_shares)]
    rows += [
        (effect.objective, effect.gradient_by_band) for effect in effects if effect.gradient_by_band
    ]

    def draw(dress: Dress) -> Figure:
        figure, axis = axes_of(9.6, 1.3 + 0.36 * len(rows))
        colours = _ordered(dress, len(BAND_LABELS))
        places = [0.0, *(index + 0.45 for index in range(1, len(rows)))]
        lefts = [0.0] * len(rows)
        for band, (label, colour) in enumerate(zip(BAND_LABELS, colours, strict=True)):
            widths = [shares[band] for _, shares in rows]
            axis.barh(
                places, widths, left=lefts, height=0.78, color=colour, label=label,
                edgecolor=dress.page, linewidth=0.8,
            )  # fmt: skip
            for place, left, width in zip(places, lefts, widths, strict=True):
                if width >= 0.045:
                    axis.text(
                        left + width / 2, place, f"{width:.0%}", ha="center", va="center",
                        fontsize=8.5, color=_legible_on(colour),
                    )  # fmt: skip
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        axis.set_yticks(places, [name for name, _ in rows])
        axis.tick_params(axis="y", labelcolor=dress.ink, length=0)
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.grid(False)
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set_xlabel(
            "share of all tokens (first bar), and of the summed lengths of their gradients"
        )
        figure.legend(
            *axis.get_legend_handles_labels(),
            loc="outside upper center", ncols=len(BAND_LABELS), title="probability of the target",
            columnspacing=1.2, handlelength=1.2,
        )  # fmt: skip
        return figure

    return draw


def gates_figure(
    table: TokenTable, gates: Mapping[str, Tensor], groups: Mapping[str, list[str]]
) -> Callable[[Dress], Figure]:
    """Each objective's gate over the target's probability: means, and how far tokens lie from them."""
    edges = np.linspace(0, 1, 26)
    place = np.clip(np.digitize(as_array(table.p), edges) - 1, 0, len(edges) - 2)
    middles = (edges[1:] + edges[:-1]) / 2

    def draw(dress: Dress) -> Figure:
        figure, axis = axes_of(7.2, 3.6)
        for name, same in groups.items():
            gate = as_array(gates[name])
            some = [bin for bin in range(len(middles)) if (place == bin).any()]
            means = [gate[place == bin].mean() for bin in some]
            low, high = ([np.quantile(gate[place == bin], q) for bin in some] for q in (0.1, 0.9))
            colour, line = _colour(dress, name), _line(name)
            axis.fill_between(middles[some], low, high, color=colour, alpha=0.12, linewidth=0)
            axis.plot(
                middles[some], means, color=colour, linestyle=line, label=literal(" = ".join(same))
            )
        axis.set_xlim(0, 1)
        axis.set_ylim(-0.02, 1.05)
        axis.set_xlabel("probability of the target")
        axis.set_ylabel("gate")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
        return figure

    return draw


def gradients_figure(
    gradients: GradientMap, groups: Mapping[str, list[str]]
) -> Callable[[Dress], Figure]:
    """Length of the gradient over probability and entropy, a panel an objective."""
    columns = min(len(groups), 3)
    rows = -(-len(groups) // columns)

    def draw(dress: Dress) -> Figure:
        figure, axes = many_axes(9.6, 0.7 + 2.35 * rows, rows, columns, sharex=True, sharey=True)
        mesh: Any = None
        for axis, (name, same) in zip(axes, groups.items(), strict=False):
            means = np.array(gradients.means[name], dtype=float)
            axis.set_facecolor(dress.grid)
            axis.grid(False)
            mesh = axis.pcolormesh(
                gradients.probability_edges, gradients.entropy_edges,
                np.ma.masked_invalid(means), cmap=dress.ordered, vmin=0, vmax=np.sqrt(2),
            )  # fmt: skip
            axis.set_title(" = ".join(same))
        for axis in axes[len(groups) :]:
            axis.set_visible(False)
        figure.supxlabel("probability of the target", fontsize=9.5)
        figure.supylabel("entropy (nats)", fontsize=9.5)
        bar = figure.colorbar(mesh, ax=axes, shrink=0.9, pad=0.015)
        bar.set_label("mean length of the gradient")
        bar.outline.set_visible(False)
        return figure

    return draw


def _bars(axis: Axes, histogram: Histogram, colour: str) -> None:
    axis.stairs(histogram.shares, histogram.edges, fill=True, color=colour, alpha=0.85)
    axis.set_xlim(histogram.edges[0], histogram.edges[-1])


def _ordered(dress: Dress, count: int) -> list[Any]:
    """Colours from little to much."""
    return list(dress.ordered(np.linspace(0.05, 0.93, count)))


def _legible_on(colour: Any) -> str:
    red, green, blue = colour[:3]
    return "#10141a" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.42 else "#ffffff"


def _colour(dress: Dress, objective: str) -> str:
    known = objective in _PLACES
    place = _PLACES.index(objective) if known else sum(map(ord, objective))
    return dress.series[place % len(dress.series)]


def _line(objective: str) -> str:
    return "-" if objective in ("deft", "cayley_trans", "nll", "p") else "--"
