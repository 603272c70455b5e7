"""The metrics of one run: objective and nll, focus and gate, entropy, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..report.runs import Series, series_of

# Panels: title, metrics and their labels, whether the axis is [0, 1]. A panel without data is left out.
PANELS: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("Loss (nats per token)", {"objective_loss": "objective", "nll": "nll"}, False),
    (
        "Gate and what it is made of",
        {"mean_gate": "gate", "mean_focus": "focus", "mean_target_probability": "target probability"},
        True,
    ),
    ("Entropy of the predictions (nats)", {"entropy": "entropy"}, False),
    (
        "Share of tokens",
        {"mean_token_accuracy": "predicted right", "closed_gate_share": "gate below 0.1"},
        True,
    ),
    ("Scored tokens", {"scored_tokens": "tokens"}, False),
)  # fmt: skip
# Drawn where they are asked for alone.
ON_REQUEST = {"scored_tokens"}
# TRL's own losses are logged under this name alone.
OWN_LOSS = ("Loss", {"loss": "loss"}, False)


def plot_metrics(
    log_history: Sequence[Mapping[str, Any]], path: Path, title: str, metrics: Sequence[str] = ()
) -> None:
    """Draw the metrics of a trainer's log at `path`: training as lines, held out as dots.

    Args:
        log_history: a trainer's.
        path: of the picture; its suffix is its format, and its folder is made where it is missing.
        title: of the picture.
        metrics: which to draw; none for all of `PANELS` but those `ON_REQUEST`.

    Raises:
        ValueError: the log has none of the metrics, or one of `metrics` is unknown or was not logged.
    """
    names = {name for entry in log_history for name in entry}
    # What has a value at a step.
    logged = {name.removeprefix("eval_") for name in names if series_of(log_history, name)}
    candidates = (
        PANELS if "objective_loss" in logged and "loss" not in metrics else (OWN_LOSS, *PANELS)
    )
    known = [name for _, labels, _ in (OWN_LOSS, *PANELS) for name in labels]
    for name in metrics:
        if name not in known:
            raise ValueError(f"--metric {name!r} is unknown. Choices: {', '.join(known)}.")
        if name not in logged:
            found = ", ".join(name for name in known if name in logged) or "none of them"
            raise ValueError(
                f"--metric {name!r} was not logged. Of the choices there are: {found}."
            )
    shown = logged.intersection(metrics) if metrics else logged - ON_REQUEST
    panels = [
        (panel, {name: label for name, label in labels.items() if name in shown}, is_share)
        for panel, labels, is_share in candidates
        if shown & labels.keys()
    ]
    if not panels:
        raise ValueError(
            f"The log has no metrics to plot, only {', '.join(sorted(names)) or 'no entries'}."
        )
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 0.5 + 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
    figure.suptitle(f"{title}\nlines: training, dots: held out", fontsize=11)
    for axis, (panel, labels, is_share) in zip(axes.flat, panels, strict=False):
        for index, (name, label) in enumerate(labels.items()):
            trained = series_of(log_history, name)
            held_out = series_of(log_history, f"eval_{name}")
            if trained or held_out:
                axis.plot(*_columns(trained), color=f"C{index}", label=label)
                axis.plot(*_columns(held_out), "o", color=f"C{index}", markersize=5)
        axis.set_title(panel, fontsize=10)
        axis.tick_params(labelbottom=True)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if is_share:
            axis.set_ylim(-0.03, 1.03)
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.supxlabel("optimizer step", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _columns(series: Series) -> tuple[list[float], list[float]]:
    return list(series), list(series.values())
