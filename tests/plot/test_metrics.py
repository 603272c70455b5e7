"""The plot of a trainer's log."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deft_plugin.histograms import EDGES, Histogram
from deft_plugin.telemetry import FILE_NAME, LoggedHistograms, read_histograms

pytest.importorskip("matplotlib", reason="needs the extra `report`")

from matplotlib.figure import Figure

from deft_plugin import plot

WINDOW = {"loss": 2.0, "entropy": 1.0, "mean_token_accuracy": 0.5}
GATED = {
    **WINDOW,
    "objective_loss": 2.0,
    "nll": 2.5,
    "mean_focus": 0.3,
    "mean_gate": 0.6,
    "mean_target_probability": 0.4,
    "closed_gate_share": 0.1,
    "scored_tokens": 200,
}


def log_history(metrics: dict[str, float]) -> list[dict[str, Any]]:
    """A held-out entry at step 0, and a training and a held-out entry at steps 10 and 20."""
    held_out = {f"eval_{name}": value for name, value in metrics.items()}
    windows = [{"step": step, **entry} for step in (10, 20) for entry in (metrics, held_out)]
    return [{"step": 0, **held_out}, *windows, {"step": 20, "train_runtime": 1.0}]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that were saved."""
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **options: figures.append(figure))
    return figures


@pytest.mark.parametrize(
    ("metrics", "labels"),
    [
        (
            GATED,
            {"objective", "nll", "gate", "focus", "target probability", "entropy"}
            | {"predicted right", "gate below 0.1"},
        ),
        (WINDOW, {"loss", "entropy", "predicted right"}),
    ],
    ids=["objective", "TRL's own loss"],
)
def test_each_logged_metric_is_drawn_for_training_and_held_out(
    metrics: dict[str, float], labels: set[str], drawn: list[Any], tmp_path: Path
) -> None:
    plot.plot_metrics(log_history(metrics), tmp_path / "metrics.png", "title")
    (figure,) = drawn
    lines = [line for axis in figure.axes for line in axis.get_lines()]
    assert {line.get_label() for line in lines if not line.get_label().startswith("_")} == labels
    assert sorted(tuple(line.get_xdata()) for line in lines) == sorted(
        [(10, 20), (0, 10, 20)] * len(labels)
    )


def test_the_png_is_as_large_as_a_page_is_wide(tmp_path: Path) -> None:
    plot.plot_metrics(log_history(GATED), tmp_path / "metrics.png", "title")
    header = (tmp_path / "metrics.png").read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:])
    assert header.startswith(b"\x89PNG")
    assert 1000 <= width <= 2000
    assert 600 <= height <= 1500


def test_a_log_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metrics to plot, only step, train_runtime"):
        plot.plot_metrics([{"step": 1, "train_runtime": 1.0}], tmp_path / "metrics.png", "title")


def logged_histograms(steps: list[int], names: tuple[str, ...]) -> list[LoggedHistograms]:
    """At each step another bin has three quarters of the tokens, the one in the middle the rest."""
    entries = []
    for step in steps:
        counts = [0] * len(EDGES)
        counts[step % len(EDGES)] += 3
        counts[len(EDGES) // 2] += 1
        histograms = {name: Histogram(tuple(counts)) for name in names}
        entries.append(LoggedHistograms(step, "training", histograms))
    return entries


@pytest.mark.parametrize("names", [("target_probability", "focus", "gate"), ("gate",)])
@pytest.mark.parametrize("steps", [[4], [1, 3, 39]])
def test_heat_maps_show_the_shares_of_tokens_over_steps(
    names: tuple[str, ...], steps: list[int], drawn: list[Any], tmp_path: Path
) -> None:
    entries = logged_histograms(steps, names)
    plot.plot_histograms(entries, tmp_path / "histograms.png", "title")
    (figure,) = drawn
    meshes = [axis.collections[0] for axis in figure.axes[: 2 * len(names)]]
    for mesh, view in zip(meshes, ["linear", "log10"] * len(names), strict=True):
        shares = np.asarray(mesh.get_array().filled(0)).reshape(-1, len(steps))
        for column, entry in zip(shares.T, entries, strict=True):
            _, counts = getattr(entry.histograms[names[0]], view)()
            np.testing.assert_allclose(column[: len(counts)], np.array(counts) / 4)
            assert column.sum() == pytest.approx(1)
    x = meshes[0].get_coordinates()[0, :, 0]
    assert all(low < step < high for low, step, high in zip(x, steps, x[1:], strict=False))


def test_a_runs_histograms_are_found_beside_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-20"
    checkpoint.mkdir()
    state = checkpoint / "trainer_state.json"
    state.write_text(json.dumps({"log_history": log_history(GATED)}))
    plot.plot_runs([str(state)])
    assert not [*tmp_path.glob("histograms_*.png")]
    entry = {"edges": EDGES, "gate": [1] * len(EDGES)}
    # An evaluation that was added later.
    lines = [(2, "training"), (4, "training"), (4, "eval"), (0, "eval")]
    (tmp_path / FILE_NAME).write_text(
        "".join(json.dumps({"step": step, "split": split, **entry}) + "\n" for step, split in lines)
    )
    assert len(read_histograms(tmp_path / FILE_NAME)) == len(lines)
    plot.plot_runs([str(state)])
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == ["histograms_eval.png", "histograms_training.png", "metrics.png"]
