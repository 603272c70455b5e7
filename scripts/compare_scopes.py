"""How far the gradient of a step depends on its split into micro-batches, by scope of `cayley_trans`.

    python scripts/compare_scopes.py       # the shipped model on a mixture of its tasks and of new ones

Every step has 32 rows. Its gradient in all parameters, the sum over tokens divided by their number as the trainers form
it, is taken from the whole step with its exact mean of p, and from micro-batches with the mean that the scope gives
them. Shown is the norm of the difference over the norm, on average over the steps ("ema" without the first, which has no
step before it). The model does not change, so that "ema" differs by what steps differ in.
"""

from __future__ import annotations

import process_setup  # noqa: F401

# isort: split
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tasks import (
    FINE_TUNING_TASKS,
    IGNORED,
    PRETRAINING_TASKS,
    labelled_answers,
    make_mixture,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from deft_plugin import GatedHead, add_gated_head, build_objective
from deft_plugin.step_mean import DEFAULT_DECAY

BASE_MODEL = Path(__file__).resolve().parent.parent / "assets" / "base_model"
ROWS = 32
SPLITS = (1, 4, 8, 16, 32)  # micro-batches of a step

console = Console()


def make_steps(model: str, steps: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of `ROWS` rows, padded, scored in the answers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tasks = PRETRAINING_TASKS | FINE_TUNING_TASKS
    mixture, _ = make_mixture(tasks, -(-steps * ROWS // len(tasks)), 0, seed)
    starts = range(0, steps * ROWS, ROWS)
    return [dict(labelled_answers(tokenizer, mixture[i : i + ROWS])) for i in starts]


def step_gradient(
    head: GatedHead, batch: dict[str, Tensor], micro_batches: int, mean: float | None
) -> Tensor:
    """The gradient of one step in all parameters, flat; with mean None, each micro-batch has its own."""
    head.objective = build_objective("cayley_trans").at_mean(mean)  # type: ignore[attr-defined]
    count = int((batch["labels"][:, 1:] != IGNORED).sum())
    head.model.zero_grad()
    for rows in torch.arange(ROWS).chunk(micro_batches):
        part = {name: value[rows] for name, value in batch.items()}
        head.model(**part, num_items_in_batch=count).loss.backward()
    gradients = [p.grad.flatten() for p in head.model.parameters() if p.grad is not None]
    return torch.cat(gradients)


def mean_probability(head: GatedHead, batch: dict[str, Tensor]) -> float:
    """The mean of p over a step."""
    with torch.no_grad():
        output = head.model(**batch)
    return float(output.log_p[output.label_mask].exp().mean())


def main(
    model: Annotated[str, typer.Option(help="A folder.")] = str(BASE_MODEL),
    steps: Annotated[int, typer.Option(min=2, help="Steps of 32 rows.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Draws the rows.")] = 1,
) -> None:
    """Print the table."""
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    head = add_gated_head(causal_lm, "cayley_trans")
    differences: dict[tuple[str, int], list[float]] = defaultdict(list)
    running: float | None = None
    for batch in track(make_steps(model, steps, seed), "steps", console=console):
        exact = mean_probability(head, batch)
        whole = step_gradient(head, batch, 1, exact)
        for split in SPLITS:
            for scope, mean in {"micro_batch": None, "global": exact, "ema": running}.items():
                if scope == "ema" and running is None:
                    continue  # The first step has the exact mean.
                gradient = step_gradient(head, batch, split, mean)
                differences[scope, split].append(float((gradient - whole).norm() / whole.norm()))
        running = (
            exact if running is None else DEFAULT_DECAY * running + (1 - DEFAULT_DECAY) * exact
        )
    table = Table(
        title=f"Difference from the whole step's gradient, by micro-batches x rows; mean of {steps} steps"
    )
    table.add_column("scope")
    for split in SPLITS:
        table.add_column(f"{split} x {ROWS // split}", justify="right")
    for scope in ("micro_batch", "global", "ema"):
        means = (sum(values) / len(values) for values in (differences[scope, s] for s in SPLITS))
        table.add_row(scope, *(f"{mean:.2%}" for mean in means))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
