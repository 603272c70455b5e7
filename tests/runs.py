"""Folders as training runs leave them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_run(
    folder: Path, *, nll: Sequence[float] = (2.0, 1.0), objective: str | None = None, **more: Any
) -> Path:
    """A run's folder as the trainers and `scripts/train.py` leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    history: list[dict[str, Any]] = []
    for index, value in enumerate(nll):
        metrics = {
            "nll": value,
            "mean_token_accuracy": 0.5,
            "mean_target_probability": 0.4 + 0.1 * index,
            "mean_focus": 0.3 + 0.1 * index,
            "mean_gate": 0.6,
            "closed_gate_share": 0.1,
            "scored_tokens": 200,
        }
        held_out = {f"eval_{name}": number for name, number in metrics.items()}
        held_out["eval_scored_tokens"] = 1234
        history += [
            {"step": 10 * index, "loss": 100.0, "objective_loss": 100.0, **metrics},
            {"step": 10 * index, "eval_loss": 100.0, "eval_runtime": 3.0, **held_out, **more},
        ]
    state = {"global_step": 10 * (len(nll) - 1), "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if objective is not None:
        results = {"loss_type": objective, "before": {}, "after": {"answer_accuracy": 0.75}}
        (folder / "results.json").write_text(json.dumps(results))
    return folder
