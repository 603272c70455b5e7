"""Figures that stay legible whatever is drawn in them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from deft_plugin.report.analysis import Standing, standing_of
from deft_plugin.report.figures.dress import LIGHT
from deft_plugin.report.figures.standing import regimes_figure
from deft_plugin.report.measurement import TokenTable, statistics_of_logits
from deft_plugin.report.regimes import REGIMES


@pytest.fixture(scope="module")
def standing() -> Standing:
    targets = torch.arange(8)
    tokens = statistics_of_logits(torch.eye(8), targets, top_ks=[])
    return standing_of(TokenTable(row=targets, position=targets, target=targets, **vars(tokens)))


def boxes(figure: Figure) -> tuple[dict[str, Bbox], dict[str, Bbox]]:
    """Where each text and each part of the marker lies, in pixels."""
    figure.draw_without_rendering()
    (axis,) = figure.axes
    unseen = axis.yaxis.findobj(Text)  # The vertical axis is not drawn.
    drawn = [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text() and text not in unseen
    ]
    texts = {text.get_text(): text.get_window_extent() for text in drawn}
    # Only your data is drawn with lines.
    lines = {f"line {index}": line.get_window_extent() for index, line in enumerate(axis.lines)}
    return texts, lines


@pytest.mark.parametrize("focus", [*np.linspace(0, 1, 101), 0.149, 0.151, 0.849, 0.851, 0.5625])
def test_no_text_of_the_regimes_lies_on_another_or_under_the_marker(
    focus: float, standing: Standing
) -> None:
    with matplotlib.rc_context(LIGHT.settings()):
        figure = regimes_figure(replace(standing, mean_focus=float(focus)))(LIGHT)
        texts, lines = boxes(figure)
    named = {f"your data: {focus:.2f}", *(f"paper: {regime.name}" for regime in REGIMES)}
    assert named < texts.keys()
    assert len(lines) == 2
    for (name, box), (other, place) in itertools.combinations({**texts, **lines}.items(), 2):
        if not {name, other} <= lines.keys():
            assert not box.overlaps(place), (name, other)
    whole = Bbox.from_bounds(0, 0, *figure.canvas.get_width_height(physical=True))
    for name, box in texts.items():
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, name
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, name
