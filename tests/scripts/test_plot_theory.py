"""The picture of the gates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

plot_theory = pytest.importorskip("plot_theory", reason="needs the extra `scripts`")


def test_curves_are_the_gates_by_their_formulas() -> None:
    p = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    cayley = p / (2 - p)
    # The target has p, the 19 other of the 20 most likely tokens the same each.
    others = (1 - p) / 19
    entropy = -(p * p.log() + 19 * torch.special.xlogy(others, others))
    expected = {
        "nll": p**0,
        "deft, the model is undecided": p ** (p * p + (1 - p) ** 2 / 149_999),
        "cayley": p**cayley,
        "cayley_trans, mean p = 0.5": p ** (0.25 + 0.75 * cayley),
        "deft, settled on another token": p ** (p * p + (1 - p) ** 2),
        "p, dft": p,
        "eaft, at most": torch.where(p > 0.05, entropy, math.log(20) * p**0) / 3,
    }
    curves = {curve.label: curve.gate for curve in plot_theory.gate_curves(p)}
    assert list(curves) == list(expected)
    for label, gate in expected.items():
        torch.testing.assert_close(curves[label], gate, rtol=1e-12, atol=1e-12)


def test_the_picture_names_every_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plot_theory.plt, "close", figures.append)
    plot_theory.plot(tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    (axis,) = figure.axes
    curves = plot_theory.gate_curves(torch.tensor([0.5]))
    assert [text.get_text() for text in axis.texts] == [curve.label for curve in curves]
    assert [line.get_color() for line in axis.lines] == [curve.colour for curve in curves]
