"""Time, peak memory and error of the loss of hidden @ weight.T, against the formula on full logits.

    python scripts/benchmark.py                       # the sizes of the README's table
    python scripts/benchmark.py --tokens 4096 --vocab 151936 --hidden 896 --csv losses.csv

Every contestant runs in a process of its own, one after the other, on the same inputs: fresh hidden states
for each repetition and logits as peaked as a trained model's (about half of the tokens predicted with
p > 0.5). Time is the median of the repetitions of forward and backward. Memory is the highest resident set
during one forward and backward in an untouched process, less the resident set before, gradients included.
Error is that of the gradients, relative to a float64 run of the formula on the first 256 tokens.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from deft_plugin import linear_gated_loss

FULL_LOGITS = "formula on full logits"
CONTESTANTS = {
    FULL_LOGITS: "deft",
    "deft_plugin deft": "deft",
    "deft_plugin cayley_trans": "cayley_trans",
    "deft_plugin nll": "nll",
    "torch cross_entropy": "nll",
}


@dataclass(frozen=True)
class Shape:
    """One problem: N tokens, V logits per token, H hidden units."""

    tokens: int
    vocab: int
    hidden: int
    frozen: bool
    dtype: str


def formula(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """DEFT as one writes it with full logits: log-softmax, a = sum p^2, (1 - p^a) / a."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probabilities = torch.log_softmax(logits, dim=-1)
    log_p = log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    focus = log_probabilities.detach().exp().square().sum(-1)
    return (-torch.expm1(focus * log_p) / focus).mean()


def loss_of(contestant: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The contestant's mean loss."""
    if contestant == FULL_LOGITS:
        return formula(hidden, weight, targets)
    if contestant == "torch cross_entropy":
        return functional.cross_entropy((hidden @ weight.T).float(), targets)
    return linear_gated_loss(hidden, weight, targets, CONTESTANTS[contestant]).loss


def make_inputs(shape: Shape, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that lean to their target by a random amount, the weight, and the targets."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape.vocab, shape.hidden, generator=torch.Generator().manual_seed(0))
    weight /= shape.hidden**0.5
    targets = torch.randint(shape.vocab, (tokens,), generator=generator)
    lean = 25 * torch.rand(tokens, 1, generator=generator)
    hidden = torch.randn(tokens, shape.hidden, generator=generator) + lean * weight[targets]
    dtype = getattr(torch, shape.dtype)
    return hidden.to(dtype), weight.to(dtype), targets


def gradients(
    contestant: str, hidden: Tensor, weight: Tensor, targets: Tensor, frozen: bool
) -> list[Tensor]:
    """One forward and backward; the gradients of the hidden states and, unless frozen, the weight."""
    inputs = [hidden.detach().requires_grad_()]
    weight = weight.detach().requires_grad_(not frozen)
    if not frozen:
        inputs.append(weight)
    loss_of(contestant, inputs[0], weight, targets).backward()
    return [tensor.grad for tensor in inputs if tensor.grad is not None]


def memory_kib(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its highest since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"{field} is not in /proc/self/status: the benchmark needs Linux.")


def measure(contestant: str, shape: Shape, repetitions: int) -> dict[str, float]:
    """Measure one contestant in this process."""
    small = Shape(64, 1024, 64, shape.frozen, shape.dtype)
    gradients(contestant, *make_inputs(small, 64, 1), shape.frozen)

    rotation = [make_inputs(shape, shape.tokens, seed) for seed in range(3)]
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_kib("VmRSS")
    gradients(contestant, *rotation[0], shape.frozen)
    extra_mib = (memory_kib("VmHWM") - before) / 1024

    times = []
    for repetition in range(repetitions):
        inputs = rotation[(repetition + 1) % len(rotation)]
        start = time.perf_counter()
        gradients(contestant, *inputs, shape.frozen)
        times.append(time.perf_counter() - start)

    error = 0.0
    if CONTESTANTS[contestant] == "deft":
        checked = make_inputs(shape, 256, 9)
        exact = gradients(FULL_LOGITS, checked[0].double(), checked[1].double(), checked[2], False)
        for ours, truth in zip(gradients(contestant, *checked, shape.frozen), exact, strict=False):
            error = max(error, float((ours.double() - truth).norm() / truth.norm()))
    return {"seconds": statistics.median(times), "extra_mib": extra_mib, "error": error}


def main(
    tokens: int = typer.Option(2048, min=1, help="N, valid tokens."),
    vocab: int = typer.Option(32768, min=2, help="V, size of the vocabulary."),
    hidden: int = typer.Option(512, min=1, help="H, hidden size."),
    dtype: str = typer.Option("float32", help="float32, bfloat16 or float16."),
    repetitions: int = typer.Option(7, min=1, help="Timed repetitions per contestant."),
    csv_path: Path | None = typer.Option(None, "--csv", help="Also write the table here."),
    worker: str | None = typer.Option(None, hidden=True),
) -> None:
    """Print a table of every contestant, with a trainable and with a frozen head."""
    if worker is not None:
        job = json.loads(worker)
        result = measure(job["contestant"], Shape(**job["shape"]), repetitions)
        print(json.dumps(result))
        return
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"dtype {dtype!r} is not one of float32, bfloat16, float16.")

    console = Console()
    rows: list[dict[str, object]] = []
    for frozen in (False, True):
        shape = Shape(tokens, vocab, hidden, frozen, dtype)
        results = {}
        for contestant in CONTESTANTS:
            with console.status(f"{'frozen' if frozen else 'trainable'} head: {contestant}"):
                job = json.dumps({"contestant": contestant, "shape": asdict(shape)})
                command = [sys.executable, __file__, "--worker", job]
                command += ["--repetitions", str(repetitions)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results[contestant] = json.loads(output.splitlines()[-1])
        table = Table(
            title=f"N={tokens:,} V={vocab:,} H={hidden:,} {dtype}, "
            f"{'frozen' if frozen else 'trainable'} head, {torch.get_num_threads()} CPU threads"
        )
        table.add_column("forward + backward")
        for column in ("time", "ratio", "peak extra memory", "ratio", "gradient error"):
            table.add_column(column, justify="right")
        base = results[FULL_LOGITS]
        for contestant, result in results.items():
            time_ratio = result["seconds"] / base["seconds"]
            memory_ratio = result["extra_mib"] / base["extra_mib"]
            table.add_row(
                contestant,
                f"{result['seconds'] * 1000:,.0f} ms",
                f"{time_ratio:.2f}",
                f"{result['extra_mib']:,.0f} MiB",
                f"1/{1 / memory_ratio:.1f}",
                f"{result['error']:.1e}" if result["error"] else "-",
            )
            rows.append({**asdict(shape), "contestant": contestant, **result})
        console.print(table)
    if csv_path is not None:
        with csv_path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        console.print(f"Written to {csv_path}")


if __name__ == "__main__":
    typer.run(main)
