"""What training has changed, token by token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..analysis import as_array
from ..changes import MARKED_CHANGE, Changes
from ..measurement import TokenTable
from .dress import Dress, many_axes

MOST_POINTS = 20_000


def changes_figure(
    before: TokenTable, after: TokenTable, changes: Changes
) -> Callable[[Dress], Figure]:
    """Change of probability against change of loss, and who learned and who forgot."""
    p = as_array(before.p)
    p_change = as_array(after.p) - p
    nll_change = as_array(before.statistics.log_p) - as_array(after.statistics.log_p)
    chosen = np.random.default_rng(0).permutation(len(p))[:MOST_POINTS]

    def draw(dress: Dress) -> Figure:
        figure, axes = many_axes(9.6, 3.9, 1, 2, width_ratios=(1.25, 1))
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
        figure, axes = many_axes(9.6, 3.1, 1, 2)
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
