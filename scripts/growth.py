"""How time and memory of the loss grow with tokens, vocabulary and ranks, and what a training step sends.

    python scripts/growth.py measure                     # on the GPUs if there are any
    python scripts/growth.py measure --device cpu
    python scripts/growth.py plan --ranks 16 --tokens 8192   # an 8B model; arithmetic, see docs/scaling.md

`measure` runs DEFT and its formula on full logits, forward and backward as `benchmark.py` does, on more and more
tokens and on larger and larger vocabularies; then DEFT on ranks that share one vocabulary (tensor parallelism),
with the bytes that each hands to collectives. On a CPU a rank has one thread, and ranks beyond the number of cores
take turns. Tables, growth.csv and growth.png.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bad_values import as_bad_parameters
from rich.table import Table
from torch import Tensor, distributed, multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from deft_plugin import linear_gated_loss
from deft_plugin.benchmark.contestants import FORMULA
from deft_plugin.benchmark.files import write_csv
from deft_plugin.benchmark.job import Job, make_inputs, resolve_device
from deft_plugin.benchmark.measure import gradients, peak_extra_mib
from deft_plugin.benchmark.processes import run_workers
from deft_plugin.cli.console import table_console
from deft_plugin.ops.shard import VocabularyShard

console = table_console()
CONTESTANTS = (FORMULA, "deft_plugin deft")
RANKS = (1, 2, 4)
# What grows, and the column of its size.
GROWN = {"tokens": "tokens", "vocabulary": "vocab", "ranks": "ranks"}

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@dataclass(frozen=True)
class Sizes:
    """Tokens and vocabularies to grow over; while one grows the other is the middle of its own."""

    tokens: tuple[int, ...]
    vocab: tuple[int, ...]
    hidden: int
    dtype: str

    def jobs(self, device: str, repetitions: int) -> dict[str, list[Job]]:
        """What is measured, by what grows."""

        def job(tokens: int, vocab: int, frozen: bool) -> Job:
            return Job(
                tokens, vocab, self.hidden, frozen, self.dtype, "trained", device, repetitions
            )

        tokens, vocab = (sizes[len(sizes) // 2] for sizes in (self.tokens, self.vocab))
        heads = (False, True)
        return {
            "tokens": [job(n, vocab, frozen) for frozen in heads for n in self.tokens],
            "vocabulary": [job(tokens, v, frozen) for frozen in heads for v in self.vocab],
            "ranks": [job(tokens, vocab, frozen) for frozen in heads],
        }


SIZES = {
    "cpu": Sizes(
        (512, 1024, 2048, 4096, 8192), (8192, 16384, 32768, 65536, 131072), 256, "float32"
    ),
    "cuda": Sizes(
        (4096, 8192, 16384, 32768, 65536), (32000, 64000, 128256, 256000), 4096, "bfloat16"
    ),
}


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this rank hands to all-reduces."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "c10d::allreduce_" in function.name():
            self.total += sum(tensor.nbytes for tensor in args[0])
        return function(*args, **(kwargs or {}))


def reduced_bytes(tokens: int, hidden: int, item_size: int) -> int:
    """What DEFT over a sharded vocabulary all-reduces: four float32 a token, and the hidden states' gradient.

    The trainers' entropy is a fifth float32.
    """
    return tokens * (4 * 4 + hidden * item_size)


def measure_shard(rank: int, ranks: int, port: int, job: Job, queue: Any) -> None:
    """Measure DEFT on one rank's part of the vocabulary, in a process of its own."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if job.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if job.device == "cuda" else "gloo"
    distributed.init_process_group(backend, rank=rank, world_size=ranks)
    group = distributed.group.WORLD
    assert group is not None

    def part(job: Job, seed: int) -> tuple[VocabularyShard, Tensor, Tensor, Tensor]:
        hidden, weight, targets = make_inputs(job, job.tokens, seed)
        shard = VocabularyShard(group, job.vocab)
        return shard, hidden, weight[shard.first :][: shard.size].clone(), targets

    def run(shard: VocabularyShard, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return linear_gated_loss(hidden, weight, targets, "deft", shard=shard).loss

        gradients(loss, hidden, weight, targets, job.frozen)

    run(*part(Job(**{**asdict(job), "tokens": 64, "vocab": 1024, "hidden": 64}), 1))
    rotation = [part(job, seed) for seed in range(3)]
    if job.device == "cuda":
        run(*rotation[0])
    extra_mib = peak_extra_mib(lambda: run(*rotation[0]), job.device)
    times = []
    for repetition in range(job.repetitions):
        distributed.barrier()
        start = time.perf_counter()
        run(*rotation[(repetition + 1) % 3])
        if job.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    with SentBytes() as sent:
        run(*rotation[0])
    seconds = statistics.median(times)
    queue.put({"seconds": seconds, "extra_mib": extra_mib, "reduced_bytes": sent.total})
    distributed.destroy_process_group()


def run_ranks(ranks: int, job: Job) -> dict[str, Any]:
    """The slowest rank's time, the largest memory, and the bytes that a rank reduces."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(measure_shard, (ranks, port, job, queue), nprocs=ranks)
    results = [queue.get() for _ in range(ranks)]
    return {name: max(result[name] for result in results) for name in results[0]}


def measured(jobs: dict[str, list[Job]]) -> list[dict[str, Any]]:
    """A row for every contestant on every job."""
    rows: list[dict[str, Any]] = []
    for grown in ("tokens", "vocabulary"):
        for job, contestants in run_workers(CONTESTANTS, jobs[grown], console=console).items():
            for name, result in contestants.items():
                rows.append(
                    {"grown": grown, "contestant": name, "ranks": 1, **asdict(job), **result}
                )
    for job in jobs["ranks"]:
        for ranks in RANKS:
            if job.device == "cuda" and ranks > torch.cuda.device_count():
                result: dict[str, Any] = {"absent": f"{torch.cuda.device_count()} GPU(s)"}
            else:
                with console.status(f"{ranks} rank(s): {job.title}"):
                    result = run_ranks(ranks, job)
            name = CONTESTANTS[1]
            rows.append(
                {"grown": "ranks", "contestant": name, "ranks": ranks, **asdict(job), **result}
            )
    return rows


def growth_table(rows: list[dict[str, Any]], grown: str, frozen: bool) -> Table:
    """One table: figures of every contestant, for what grows."""
    chosen = [row for row in rows if (row["grown"], row["frozen"]) == (grown, frozen)]
    one = chosen[0]
    fixed = {
        "tokens": "V={vocab:,}",
        "vocabulary": "N={tokens:,}",
        "ranks": "N={tokens:,} V={vocab:,}",
    }
    head = "frozen" if frozen else "trainable"
    table = Table(
        title=f"{grown} grow: {fixed[grown].format(**one)} H={one['hidden']:,}, {head} lm_head"
    )
    for column in (grown, "loss", "fwd + bwd", "peak extra", "reduced"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for row in chosen:
        size = row[GROWN[grown]]
        if "absent" in row:
            table.add_row(f"{size:,}", row["contestant"], f"not measured: {row['absent']}", "", "")
            continue
        reduced = row.get("reduced_bytes")
        table.add_row(
            f"{size:,}",
            row["contestant"],
            f"{row['seconds'] * 1000:,.0f} ms",
            f"{row['extra_mib']:,.0f} MiB",
            "" if reduced is None else f"{reduced / 2**20:,.2f} MiB",
        )
    return table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory over tokens, vocabulary and ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for column, (grown, field) in enumerate(GROWN.items()):
        for value, label, axis in (
            ("seconds", "seconds", axes[0][column]),
            ("extra_mib", "peak extra memory, MiB", axes[1][column]),
        ):
            for index, name in enumerate(CONTESTANTS):
                for frozen in (False, True):
                    line = [
                        (row[field], row[value])
                        for row in rows
                        if (row["grown"], row["contestant"], row["frozen"]) == (grown, name, frozen)
                        and value in row
                    ]
                    if line:
                        style = {"color": "C7" if index == 0 else "C1", "marker": "o"}
                        head = "frozen" if frozen else "trainable"
                        axis.plot(
                            *zip(*line, strict=True),
                            linestyle="--" if frozen else "-",
                            label=f"{name}, {head}",
                            **style,
                        )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(grown)
            axis.set_ylabel(label)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@app.command("measure")
def measure_command(
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto.")] = "auto",
    repetitions: Annotated[int, typer.Option(min=1, help="Timed repetitions.")] = 5,
    output: Annotated[Path, typer.Option(help="Folder for the CSV and the PNG.")] = Path(
        "runs/growth"
    ),
) -> None:
    """Measure how the loss grows."""
    with as_bad_parameters():
        device = resolve_device(device)
    rows = measured(SIZES[device].jobs(device, repetitions))
    for grown in GROWN:
        for frozen in (False, True):
            console.print(growth_table(rows, grown, frozen))
    write_csv(rows, output / "growth.csv")
    plot(rows, output / "growth.png")
    console.print(f"Also in {output}: growth.csv, growth.png")


@dataclass(frozen=True)
class Plan:
    """A training step of one model on many ranks. Sizes in numbers, not bytes.

    Args:
        parameters: of the whole model; layers, hidden, vocab: its shape.
        trained: parameters that train: all, or an adapter's.
        ranks: processes, one GPU each.
        tokens: of one micro-batch on one rank; with tensor parallelism, of one micro-batch.
        micro_batches: per rank and optimizer step.
        item_size: bytes of a parameter, gradient and activation that is sent.
    """

    parameters: float
    trained: float
    layers: int
    hidden: int
    vocab: int
    ranks: int
    tokens: int
    micro_batches: int
    item_size: int = 2

    def sent_bytes(self) -> dict[str, float]:
        """What each rank sends in an optimizer step, by strategy; rings send (R - 1) / R of a buffer per pass."""
        ring = (self.ranks - 1) / self.ranks
        gradients = self.trained * self.item_size * ring
        weights = self.parameters * self.item_size * ring
        activations = self.tokens * self.hidden * self.item_size * 2 * ring
        steps = self.micro_batches
        return {
            "DDP, ZeRO-1": 2 * gradients,
            "ZeRO-2": steps * gradients + gradients,
            "ZeRO-3, FSDP2": steps * (2 * weights + gradients),
            "tensor parallel, layers": steps * 4 * self.layers * activations,
            "tensor parallel, gated lm_head": steps
            * 2
            * ring
            * reduced_bytes(self.tokens, self.hidden, self.item_size),
            "tensor parallel, gathered logits": steps
            * self.tokens
            * self.vocab
            * self.item_size
            * ring,
        }

    def flops(self) -> float:
        """Of a rank's step under data parallelism: forward, backward to inputs and, where trained, to weights."""
        return 2 * (2 * self.parameters + self.trained) * self.tokens * self.micro_batches


def positive(value: float | None) -> float | None:
    """Refuse what no step could have."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} must be a finite number > 0.")
    return value


@app.command("plan")
def plan_command(
    parameters: Annotated[
        float, typer.Option(help="Of the whole model.", callback=positive)
    ] = 8.03e9,
    trained: Annotated[
        float | None, typer.Option(help="Parameters that train; all.", callback=positive)
    ] = None,
    layers: Annotated[int, typer.Option(min=1)] = 32,
    hidden: Annotated[int, typer.Option(min=1)] = 4096,
    vocab: Annotated[int, typer.Option(min=1)] = 128256,
    ranks: Annotated[int, typer.Option(min=1, help="GPUs.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Of a rank's micro-batch.")] = 8192,
    micro_batches: Annotated[int, typer.Option(min=1, help="Per rank and step.")] = 1,
    bandwidth: Annotated[
        float, typer.Option(help="GB/s that a rank can send.", callback=positive)
    ] = 50.0,
    rate: Annotated[
        float, typer.Option(help="TFLOP/s that a rank attains.", callback=positive)
    ] = 400.0,
) -> None:
    """What a step sends, how long that takes, and how that compares with its arithmetic."""
    plan = Plan(
        parameters,
        parameters if trained is None else trained,
        layers,
        hidden,
        vocab,
        ranks,
        tokens,
        micro_batches,
    )
    computing = plan.flops() / (rate * 1e12)
    model = f"P={plan.parameters:.3g} T={plan.trained:.3g} V={vocab:,} H={hidden:,} L={layers}"
    table = Table(
        title=f"{model}; {ranks} ranks, {micro_batches} x {tokens:,} tokens a rank; "
        f"arithmetic {computing:.2f} s a step"
    )
    for column in ("strategy", "sent by a rank", "takes", "of the arithmetic"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for strategy, sent in plan.sent_bytes().items():
        sending = sent / (bandwidth * 1e9)
        # Tensor parallelism shares one micro-batch's arithmetic among the ranks.
        shared = strategy.startswith("tensor")
        part = f"{sending / (computing / ranks if shared else computing):.0%}"
        table.add_row(
            strategy,
            f"{sent / 2**30:,.3f} GiB",
            f"{sending:.3f} s",
            f"{part} of a rank's share" if shared else part,
        )
    console.print(table)


if __name__ == "__main__":
    app()
