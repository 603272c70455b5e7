"""How figures look: colours of the page, light and dark, and a figure drawn in both."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

DOTS_PER_INCH = 160


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
LINES = ("-", "--", "-.", ":")


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


def axes_of(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one panel."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def many_axes(
    width: float, height: float, rows: int, columns: int, **options: Any
) -> tuple[Figure, list[Any]]:
    """A figure of several panels, row by row."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def literal(name: str) -> str:
    """For a legend, which leaves out names with "_" in front and takes "$" for a formula."""
    shown = textwrap.shorten(name, 48, placeholder="…").replace("$", "\\$")
    return f" {shown}" if shown.startswith("_") else shown


def _fewer_colours(png: bytes) -> bytes:
    """The same picture with a palette, a third of the size."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        buffer = io.BytesIO()
        image.convert("RGB").quantize(255).save(buffer, "PNG", optimize=True)
    return min(png, buffer.getvalue(), key=len)
