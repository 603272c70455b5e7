"""What histograms cost: the time of a training step with and without them, in turn in one process.

    python scripts/histogram_cost.py                                    # the shipped model, 16 rows of 128 tokens
    python scripts/histogram_cost.py --model runs/models/SmolLM2-135M-Instruct --rows 4 --steps 10

A step is one micro-batch: forward and backward of DEFT, the metrics, an update by SGD, and the means, as they are logged
with logging_steps=1. Which one goes first changes from pair to pair. Shown are medians, and of the pairs' differences the
median and the quartiles; then the metrics of a micro-batch alone. On a CPU it is the process's own time that counts, which
other work on the machine changes less.
"""

from __future__ import annotations

import process_setup  # noqa: F401

# isort: split
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from deft_plugin import GatedLoss, add_gated_head
from deft_plugin.metrics import TokenMetrics

BASE_MODEL = Path(__file__).resolve().parent.parent / "assets" / "base_model"
REPETITIONS = 50

console = Console()


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """How long a call takes."""
    if device.type == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.accelerator.synchronize()
    start = time.perf_counter()
    function()
    torch.accelerator.synchronize()
    return time.perf_counter() - start


def main(
    model: Annotated[str, typer.Option(help="A folder or a name on the hub.")] = str(BASE_MODEL),
    rows: Annotated[int, typer.Option(min=1, help="Of a micro-batch.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 128,
    steps: Annotated[int, typer.Option(min=2, help="Pairs of steps.")] = 30,
) -> None:
    """Print the table."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
    head = add_gated_head(trained, "deft", with_entropy=True)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    size = trained.config.get_text_config().vocab_size
    ids = torch.randint(size, (rows, length), generator=generator).to(device)
    passes: list[GatedLoss] = []

    def step(metrics: TokenMetrics) -> Tensor:
        with head.observed_by(metrics.add):
            loss: Tensor = trained(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics.means(device)
        metrics.reset()
        return loss

    with head.observed_by(passes.append), torch.no_grad():
        trained(input_ids=ids, labels=ids)
    (gated,) = passes
    kinds = {"without": TokenMetrics(), "with": TokenMetrics(histograms=True)}
    for metrics in kinds.values():
        step(metrics)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for pair in track(range(steps), "steps", console=console, transient=True):
        for kind in sorted(kinds, reverse=pair % 2 == 0):
            times[kind].append(seconds_of(lambda kind=kind: step(kinds[kind]), device))
    alone = {
        kind: statistics.median(
            seconds_of(lambda metrics=metrics: metrics.add(gated), device)
            for _ in range(REPETITIONS)
        )
        for kind, metrics in kinds.items()
    }
    threads = f"{torch.get_num_threads()} threads of a CPU" if device.type == "cpu" else device.type
    title = f"{Path(model).name}, {rows} x {length} tokens, {threads}, {steps} pairs of steps"
    table = Table(title=title)
    for column in ("", "without", "with", "difference", "of a step"):
        table.add_column(column, justify="right")
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    pairs = zip(times["with"], times["without"], strict=True)
    low, middle, high = statistics.quantiles([b - a for b, a in pairs])
    for name, values, difference in (
        ("a step", medians, middle),
        ("its metrics", alone, alone["with"] - alone["without"]),
    ):
        cells = [*values.values(), difference]
        share = difference / medians["without"]
        table.add_row(name, *(f"{1e3 * cell:.3f} ms" for cell in cells), f"{100 * share:+.2f} %")
    console.print(table)
    console.print(f"quartiles of the steps' differences: {1e3 * low:+.3f} ms, {1e3 * high:+.3f} ms")


if __name__ == "__main__":
    typer.run(main)
