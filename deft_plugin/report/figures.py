"""The figures, each in a light and a dark dress; they draw numbers and work nothing out."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from .analysis import (
    BAND_LABELS,
    REGIMES,
    Effect,
    GradientMap,
    Histogram,
    Standing,
    as_array,
)
from .changes import MARKED_CHANGE, Changes
from .measurement import TokenTable
from .runs import COMPARED, Run

DOTS_PER_INCH = 160
MOST_POINTS = 20_000


@dataclass(frozen=True)
class Dress:
    """Colours of a figure: those of the page, and series that are told apart in both and by colour-blind readers.

    Args:
        name: "light" or "dark".
        page, ink, faint, grid: of the background, text, what is secondary, lines behind.
        series: of what has no order.
        before, after: of two checkpoints.
        ordered: a scale from little to much, of even steps in lightness, all of it apart from the page.
    """

    name: str
    page: str
    ink: str
    faint: str
    grid: str
    series: tuple[str, ...]
    before: str
    after: str
    ordered: Any

    def settings(self) -> Any:
        """For matplotlib."""
        return {
            "figure.facecolor": self.page,
            "axes.facecolor": self.page,
            "savefig.facecolor": self.page,
            "text.color": self.ink,
            "axes.labelcolor": self.ink,
            "axes.titlecolor": self.ink,
            "xtick.color": self.faint,
            "ytick.color": self.faint,
            "axes.edgecolor": self.grid,
            "grid.color": self.grid,
            "legend.labelcolor": self.ink,
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 9.5,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.linewidth": 0.7,
            "lines.linewidth": 1.8,
            "figure.constrained_layout.use": True,
            "figure.dpi": DOTS_PER_INCH,
            "font.family": "sans-serif",
        }


def _scale(lowest: float, highest: float) -> Any:
    """A part of viridis, whose steps look even, in grey and to colour-blind readers too."""
    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(lowest, highest, 256)))


LIGHT = Dress(
    name="light",
    page="#ffffff",
    ink="#1d2430",
    faint="#5a6474",
    grid="#dfe3e9",
    series=("#0b6fb8", "#d1690e", "#0f8f6b", "#a8488f", "#5b6470", "#8a6d00", "#3f51b5", "#b3261e"),
    before="#8a94a3",
    after="#0b6fb8",
    ordered=_scale(0.0, 0.97),
)
DARK = Dress(
    name="dark",
    page="#171b22",
    ink="#e6e9ee",
    faint="#9aa5b4",
    grid="#323a46",
    series=("#5cb3f0", "#f0a04b", "#3fc79d", "#d98ac4", "#aab3bf", "#d8bd4a", "#8c9eff", "#f28b82"),
    before="#8a94a3",
    after="#5cb3f0",
    ordered=_scale(0.2, 1.0),
)
DRESSES = (LIGHT, DARK)
# Always the same, so that an objective is found again in the next figure.
_PLACES = ("deft", "cayley_trans", "p", "eaft", "nll", "cayley", "dft", "alpha")
_LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Picture:
    """A figure for the page.

    Args:
        name: of its file.
        alt: what it shows, for those who do not see it.
        caption: how to read it.
        light, dark: PNG files.
    """

    name: str
    alt: str
    caption: str
    light: bytes
    dark: bytes


def picture(name: str, alt: str, caption: str, draw: Callable[[Dress], Figure]) -> Picture:
    """Draw a figure in both dresses."""
    files = []
    for dress in DRESSES:
        with matplotlib.rc_context(dress.settings()):
            figure = draw(dress)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
        files.append(_fewer_colours(buffer.getvalue()))
    return Picture(name, alt, caption, files[0], files[-1])


def regimes_figure(standing: Standing) -> Callable[[Dress], Figure]:
    """The mean focus on a scale with the paper's."""

    def draw(dress: Dress) -> Figure:
        figure, axis = _axes(8.6, 1.75)
        axis.set_xlim(0, 1)
        axis.set_ylim(-1, 1.25)
        axis.grid(False)
        axis.yaxis.set_visible(False)
        axis.spines["left"].set_visible(False)
        for regime, colour in zip(REGIMES, _ordered(dress, len(REGIMES)), strict=True):
            low, high = regime.lowest, max(regime.highest, regime.lowest + 0.012)
            axis.axvspan(low, high, ymin=0.0, ymax=0.34, color=colour, linewidth=0)
            # The intermediate one stands close to the strong one.
            at, side = (low, "right") if regime.name.startswith("inter") else (high, "left")
            axis.annotate(
                f"paper: {regime.name}",
                (at, -0.62),
                xytext=(-6 if side == "right" else 6, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=9,
                color=dress.faint,
                bbox={"facecolor": dress.page, "edgecolor": "none", "pad": 1.5},
            )
        mean = standing.mean_focus
        axis.plot([mean, mean], [-1, 0.3], color=dress.series[1], linewidth=2, zorder=1)
        axis.plot([mean], [0.3], marker="v", color=dress.series[1], markersize=10, clip_on=False)
        edge = "left" if mean < 0.15 else "right" if mean > 0.85 else "center"
        axis.annotate(
            f"your data: {mean:.2f}",
            (mean, 0.62),
            ha=edge,
            fontsize=11,
            fontweight="bold",
            color=dress.series[1],
        )
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
        figure, axes = _many_axes(9.6, 2.9, 1, 3)
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
        figure, axis = _axes(9.6, 1.3 + 0.36 * len(rows))
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
        figure, axis = _axes(7.2, 3.6)
        for name, same in groups.items():
            gate = as_array(gates[name])
            some = [bin for bin in range(len(middles)) if (place == bin).any()]
            means = [gate[place == bin].mean() for bin in some]
            low, high = ([np.quantile(gate[place == bin], q) for bin in some] for q in (0.1, 0.9))
            colour, line = _colour(dress, name), _line(name)
            axis.fill_between(middles[some], low, high, color=colour, alpha=0.12, linewidth=0)
            axis.plot(
                middles[some], means, color=colour, linestyle=line, label=_literal(" = ".join(same))
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
        figure, axes = _many_axes(9.6, 0.7 + 2.35 * rows, rows, columns, sharex=True, sharey=True)
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


def changes_figure(
    before: TokenTable, after: TokenTable, changes: Changes
) -> Callable[[Dress], Figure]:
    """Change of probability against change of loss, and who learned and who forgot."""
    p = as_array(before.p)
    p_change = as_array(after.p) - p
    nll_change = as_array(before.statistics.log_p) - as_array(after.statistics.log_p)
    chosen = np.random.default_rng(0).permutation(len(p))[:MOST_POINTS]

    def draw(dress: Dress) -> Figure:
        figure, axes = _many_axes(9.6, 3.9, 1, 2, width_ratios=(1.25, 1))
        scatter, bars = axes
        points = scatter.scatter(
            p_change[chosen], nll_change[chosen], c=p[chosen], cmap=dress.ordered, vmin=0, vmax=1,
            s=9, alpha=0.75, linewidths=0,
        )  # fmt: skip
        for line in (-MARKED_CHANGE, MARKED_CHANGE):
            scatter.axvline(line, color=dress.faint, linewidth=1, linestyle=":")
        scatter.axhline(0, color=dress.faint, linewidth=1)
        scatter.set_xlim(-1.02, 1.02)
        scatter.xaxis.set_major_locator(MaxNLocator(5))
        limit = max(float(np.quantile(np.abs(nll_change), 0.998)), 0.5) * 1.05
        scatter.set_ylim(-limit, limit)
        scatter.set_xlabel("change of the target's probability")
        scatter.set_ylabel("change of -log p (nats)")
        scatter.set_title("Each dot a token")
        bar = figure.colorbar(points, ax=scatter, pad=0.02, shrink=0.9)
        bar.set_label("probability before")
        bar.solids.set_alpha(1)  # type: ignore[union-attr]
        bar.outline.set_visible(False)

        some = [band for band in changes.bands if band.tokens]
        places = np.arange(len(some))
        learned = [band.learned or 0.0 for band in some]
        forgotten = [band.forgotten or 0.0 for band in some]
        bars.barh(places, learned, height=0.62, color=dress.series[0], label="learned")
        bars.barh(
            places, [-share for share in forgotten], height=0.62, color=dress.series[1],
            label="forgotten", hatch="//", edgecolor=dress.page,
        )  # fmt: skip
        bars.axvline(0, color=dress.faint, linewidth=1)
        reach = max(*learned, *forgotten, 0.05)
        for place, gained, lost in zip(places, learned, forgotten, strict=True):
            bars.text(gained + reach * 0.03, place, f"{gained:.0%}", va="center", fontsize=8.5)
            if lost:
                bars.text(
                    -lost - reach * 0.03,
                    place,
                    f"{lost:.0%}",
                    va="center",
                    ha="right",
                    fontsize=8.5,
                )
        left = max(forgotten) + reach * 0.25
        bars.set_xlim(-left, max(learned) + reach * 0.25)
        bars.set_yticks(places, [band.band for band in some])
        bars.tick_params(axis="y", labelcolor=dress.ink, length=0)
        bars.xaxis.set_major_formatter(lambda value, _: f"{abs(value):.0%}")
        bars.xaxis.set_major_locator(MaxNLocator(5))
        bars.grid(axis="y", visible=False)
        bars.set_xlabel("share of the band's tokens")
        bars.set_title("By probability before")
        bars.legend(
            loc="upper right" if max(learned) < reach or learned[-1] < reach / 2 else "lower right"
        )
        return figure

    return draw


def before_after_figure(before: TokenTable, after: TokenTable) -> Callable[[Dress], Figure]:
    """Distributions of the target's probability under both checkpoints."""
    pair = (("before", before), ("after", after))

    def draw(dress: Dress) -> Figure:
        figure, axes = _many_axes(9.6, 3.1, 1, 2)
        linear, tail = axes
        edges = np.linspace(0, 1, 26)
        for (name, table), colour in zip(pair, (dress.before, dress.after), strict=True):
            p = as_array(table.p)
            shares = np.histogram(p, bins=edges)[0] / len(p)
            linear.stairs(shares, edges, fill=name == "before", color=colour, alpha=0.55 if name == "before" else 1,
                          linewidth=2, label=f"{name}, mean {p.mean():.2f}")  # fmt: skip
            decades = np.sort(-as_array(table.statistics.log_p)) / np.log(10)
            tail.plot(
                decades, 1 - np.arange(len(decades)) / len(decades), color=colour, label=name,
                linestyle="-", drawstyle="steps-post",
            )  # fmt: skip
        linear.set_title("All tokens")
        linear.set_xlim(0, 1)
        linear.set_ylabel("share of tokens")
        linear.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        linear.set_xlabel("probability of the target")
        linear.legend(loc="upper center")
        tail.set_title("The improbable ones")
        tail.set_xlim(left=0)
        tail.set_yscale("log")
        tail.set_xlabel("probability of the target")
        tail.xaxis.set_major_locator(MaxNLocator(integer=True))
        tail.xaxis.set_major_formatter(
            lambda value, _: "1" if value == 0 else f"$10^{{-{value:g}}}$"
        )
        tail.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        tail.set_ylabel("share of tokens below it")
        tail.legend(loc="upper right")
        return figure

    return draw


def training_figure(run: Run) -> Callable[[Dress], Figure]:
    """Mean focus and probability over a run."""
    shown = {
        "mean_focus": "focus",
        "mean_target_probability": "probability of the target",
        "mean_gate": "gate",
    }

    def draw(dress: Dress) -> Figure:
        figure, axis = _axes(7.6, 3.3)
        for (metric, label), colour in zip(shown.items(), dress.series, strict=False):
            trained, held_out = run.training(metric), run.held_out(metric)
            if trained:
                axis.plot(list(trained), list(trained.values()), color=colour, label=label)
            if held_out:
                axis.plot(
                    list(held_out), list(held_out.values()), "o", color=colour, markersize=5.5,
                    label=None if trained else label,
                )  # fmt: skip
        axis.set_ylim(-0.02, 1.02)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("mean over tokens")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
        return figure

    return draw


def comparison_figure(runs: Sequence[Run], metric: str) -> Callable[[Dress], Figure]:
    """One metric of several runs."""
    _, unit = COMPARED[metric]

    def draw(dress: Dress) -> Figure:
        columns = 2 if max(len(run.name) for run in runs) < 18 else 1
        figure, axis = _axes(4.9, 2.7 + 0.2 * -(-len(runs) // columns))
        for index, run in enumerate(runs):
            colour = dress.series[index % len(dress.series)]
            line = _LINES[(index // len(dress.series)) % len(_LINES)]
            trained, held_out = run.training(metric), run.held_out(metric)
            label = _literal(run.name if run.objective is None else f"{run.name} ({run.objective})")
            if trained:
                axis.plot(
                    list(trained), list(trained.values()), color=colour, linestyle=line,
                    alpha=0.45 if held_out else 1, linewidth=1.1 if held_out else 1.8,
                    label=None if held_out else label,
                )  # fmt: skip
            if held_out:
                axis.plot(
                    list(held_out), list(held_out.values()), color=colour, linestyle=line,
                    marker="o", markersize=4.5, label=label,
                )  # fmt: skip
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
        return figure

    return draw


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _many_axes(
    width: float, height: float, rows: int, columns: int, **options: Any
) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def _bars(axis: Axes, histogram: Histogram, colour: str) -> None:
    axis.stairs(histogram.shares, histogram.edges, fill=True, color=colour, alpha=0.85)
    axis.set_xlim(histogram.edges[0], histogram.edges[-1])


def _ordered(dress: Dress, count: int) -> list[Any]:
    """Colours from little to much."""
    return list(dress.ordered(np.linspace(0.05, 0.93, count)))


def _literal(name: str) -> str:
    """For a legend, which leaves out names with "_" in front and takes "$" for a formula."""
    shown = textwrap.shorten(name, 48, placeholder="…").replace("$", "\\$")
    return f" {shown}" if shown.startswith("_") else shown


def _legible_on(colour: Any) -> str:
    red, green, blue = colour[:3]
    return "#10141a" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.42 else "#ffffff"


def _colour(dress: Dress, objective: str) -> str:
    known = objective in _PLACES
    place = _PLACES.index(objective) if known else sum(map(ord, objective))
    return dress.series[place % len(dress.series)]


def _line(objective: str) -> str:
    return "-" if objective in ("deft", "cayley_trans", "nll", "p") else "--"


def _fewer_colours(png: bytes) -> bytes:
    """The same picture with a palette, a third of the size."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        buffer = io.BytesIO()
        image.convert("RGB").quantize(255).save(buffer, "PNG", optimize=True)
    return min(png, buffer.getvalue(), key=len)
