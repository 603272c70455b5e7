"""Plot what the gates did in a run: objective and nll, focus and gate, entropy, accuracy.

python scripts/plot_metrics.py runs/demo/trainer_state.json      # writes runs/demo/metrics.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import typer

# One panel each: title, the metrics in it, whether its axis is [0, 1].
PANELS = (
    ("loss, in nats", ("objective_loss", "nll"), False),
    (
        "focus, gate and target probability",
        ("mean_focus", "mean_gate", "mean_target_probability"),
        True,
    ),
    ("entropy, in nats", ("entropy",), False),
    ("share of tokens", ("mean_token_accuracy", "closed_gate_share"), True),
)


def plot_metrics(log_history: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the training (line) and held-out (dots) metrics of a trainer's log as a PNG at `path`."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, layout="constrained")
    figure.suptitle(title)
    for axis, (panel, names, is_share) in zip(axes.flat, PANELS, strict=True):
        for index, name in enumerate(names):
            colour = f"C{index}"
            label = name.replace("_", " ")
            trained = [(entry["step"], entry[name]) for entry in log_history if name in entry]
            held_out = [
                (entry["step"], entry[f"eval_{name}"])
                for entry in log_history
                if f"eval_{name}" in entry
            ]
            if trained:
                axis.plot(*zip(*trained, strict=True), color=colour, label=label)
            if held_out:
                axis.plot(
                    *zip(*held_out, strict=True), "o--", color=colour, alpha=0.6, linewidth=0.8,
                    label=f"{label}, held out",
                )  # fmt: skip
        axis.set_title(panel, fontsize=10)
        if is_share:
            axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    trainer_state: Path, output: Path | None = typer.Option(None, help="PNG to write.")
) -> None:
    """Plot a run's trainer_state.json."""
    state = json.loads(trainer_state.read_text())
    path = output or trainer_state.with_name("metrics.png")
    plot_metrics(state["log_history"], path, str(trainer_state.parent))
    print(f"Written to {path}")


if __name__ == "__main__":
    typer.run(main)
