"""Writes a task of the demo as chat messages in JSON lines, for trainers that read files.

    python scripts/make_messages.py                    # axolotl_configs/data/spell_backward_*.jsonl
    python scripts/make_messages.py number_filtering --output data

Each line of the files is `{"messages": [user, assistant]}`; no question of one is in the other.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer
from tasks import FINE_TUNING_TASKS, make_splits


def main(
    task: str = typer.Argument("spell_backward", help=", ".join(FINE_TUNING_TASKS)),
    output: Path = typer.Option(Path("axolotl_configs/data"), help="Folder of the two files."),
    train: int = typer.Option(1500, min=1, help="Training questions."),
    held_out: int = typer.Option(128, min=1, help="Held-out questions."),
    seed: int = typer.Option(0, min=0, help="Seeds the questions."),
) -> None:
    """Write the two files."""
    if task not in FINE_TUNING_TASKS:
        raise typer.BadParameter(f"{task!r} is none of {', '.join(FINE_TUNING_TASKS)}.")
    output.mkdir(parents=True, exist_ok=True)
    splits = make_splits(FINE_TUNING_TASKS[task], train, held_out, seed)
    for split, rows in splits.items():
        lines = (json.dumps({"messages": row["prompt"] + row["completion"]}) for row in rows)
        (output / f"{task}_{split}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
