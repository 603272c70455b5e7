"""What `train.py` shows on the console: progress, a line of metrics now and then, tables at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

LOGGED = {
    "loss": "loss",
    "nll": "nll",
    "mean_token_accuracy": "token acc",
    "mean_focus": "focus",
    "mean_gate": "gate",
}

console = Console()


class ConsoleLog(TrainerCallback):
    """A progress bar, and a line of metrics for every log; a context around `trainer.train()`."""

    def __init__(self) -> None:
        columns = (
            TextColumn("fine-tuning"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console)
        self.has_header = False
        self.bar = self.progress.add_task("steps", total=None)

    def __enter__(self) -> None:
        self.progress.start()

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.progress.update(self.bar, completed=state.global_step, total=state.max_steps)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Print the metrics of a training window, or of an evaluation in mid-training."""
        prefix = "eval_" if "eval_loss" in logs else ""
        if f"{prefix}loss" not in logs or not self.progress.live.is_started:
            return
        names = [name for name in LOGGED if prefix + name in logs]
        if not self.has_header:
            console.print(" step  split   ", *(f"{LOGGED[name]:>9}" for name in names))
            self.has_header = True
        split = "held out" if prefix else "train"
        values = (f"{logs[prefix + name]:9.3f}" for name in names)
        console.print(f"{state.global_step:5}  {split:8}", *values, highlight=False)


def results_table(before: Mapping[str, float], after: Mapping[str, float], title: str) -> Table:
    """The held-out figures before and after, a line each."""
    table = Table(title=title)
    table.add_column("held out")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, value in before.items():
        style = "bold" if name in ("answer_accuracy", "nll") else None
        figures = (
            f"{each:,}" if isinstance(each, int) else f"{each:.4f}" for each in (value, after[name])
        )
        table.add_row(name.replace("_", " "), *figures, style=style)
    return table


def answers_table(prompts: Sequence[str | list[dict[str, str]]], **answers: Sequence[str]) -> Table:
    """The ends of prompts and what each model said to them, a column a model."""
    table = Table("prompt", *(name.replace("_", " ") for name in answers), title="Held-out answers")
    for prompt, *said in zip(prompts, *answers.values(), strict=False):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        # Text, because rich would take brackets in a plain string for markup.
        table.add_row(Text(text[-200:]), *map(Text, said))
    return table
