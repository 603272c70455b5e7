"""Where the time of one call of a loss goes, kernel by kernel.

    python scripts/profile_call.py                                        # DEFT, N=8192, V=128256, H=4096, both heads
    python scripts/profile_call.py --contestant "QuACK scaled exp" --shape 8192,151936,3584
    python scripts/profile_call.py --device cpu --shape 256,4096,64

One forward and backward under torch.profiler after others that compiled and tuned. Each head's kernels are printed, those that take
longest first, and written to a CSV, beside a trace for chrome://tracing. On a CPU the rows are PyTorch's operators.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bad_values import as_bad_parameters
from benchmark_shapes import CPU_SHAPES, parse_shape
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from deft_plugin.benchmark.contestant import Machine
from deft_plugin.benchmark.contestants import CONTESTANTS, OURS
from deft_plugin.benchmark.files import write_csv
from deft_plugin.benchmark.job import (
    DTYPES,
    Job,
    check_choice,
    make_inputs,
    resolve_device,
    resolve_dtype,
)
from deft_plugin.benchmark.measure import gradients

GPU_SHAPE = "8192,128256,4096"
WARM_UP_CALLS = 3
ROWS = 25

console = Console(width=120)
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


def profile_call(contestant: str, job: Job, trace: Path) -> list[dict[str, Any]]:
    """The kernels of one forward and backward, those that take longest first.

    Returns:
        For each kernel "kernel", "calls", "milliseconds" of all of them, and "share" of all kernels' time.
    """
    loss = CONTESTANTS[contestant].build()
    inputs = make_inputs(job, job.tokens, 1)
    for _ in range(WARM_UP_CALLS):
        gradients(loss, *inputs, job.frozen)
    on_gpu = job.device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiled:
        gradients(loss, *inputs, job.frozen)
        if on_gpu:
            torch.cuda.synchronize()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiled.export_chrome_trace(str(trace))
    device_type = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # An operator's row has the time of the kernels that it launched, which have rows of their own.
    events = [
        event
        for event in profiled.key_averages()
        if event.device_type == device_type and not event.is_user_annotation
    ]
    times = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
        for event in events
    ]
    total = sum(times)
    rows = [
        {"kernel": event.key, "calls": event.count, "milliseconds": time, "share": time / total}
        for event, time in zip(events, times, strict=True)
        if time
    ]
    return sorted(rows, key=lambda row: -row["milliseconds"])


def kernels_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """The kernels that take longest, and the time of all of them."""
    table = Table(title=title)
    table.add_column("kernel", overflow="ellipsis", no_wrap=True)
    for column in ("calls", "ms", "share"):
        table.add_column(column, justify="right")
    for row in rows[:ROWS]:
        table.add_row(
            row["kernel"], str(row["calls"]), f"{row['milliseconds']:.3f}", f"{row['share']:.1%}"
        )
    table.add_section()
    calls = sum(row["calls"] for row in rows)
    total = sum(row["milliseconds"] for row in rows)
    table.add_row(f"all {len(rows)}", str(calls), f"{total:.3f}", "")
    return table


@app.command()
def main(
    contestant: Annotated[str, typer.Option(help="A contestant of the benchmark.")] = OURS,
    shape: Annotated[str | None, typer.Option(help="N,V,H. Default by device.")] = None,
    masked: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of the labels that is masked.")
    ] = 0.0,
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help=", ".join(DTYPES))] = None,
    output: Annotated[Path, typer.Option(help="Folder for the CSVs and traces.")] = Path(
        "runs/profile"
    ),
) -> None:
    """Profile one forward and backward, with a trainable and with a frozen head."""
    with as_bad_parameters():
        check_choice("--contestant", contestant, tuple(CONTESTANTS))
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        size = parse_shape(shape or (CPU_SHAPES[0] if device == "cpu" else GPU_SHAPE))
    for frozen in (False, True):
        job = Job(*size, frozen, dtype, "trained", device, 1, masked)
        unmet = CONTESTANTS[contestant].needs.unmet(Machine.here(device), job)
        if unmet is not None:
            raise typer.BadParameter(f"--contestant {contestant!r} cannot run: {unmet}.")
        head = "frozen" if frozen else "trainable"
        rows = profile_call(contestant, job, output / f"{head}.json")
        console.print(kernels_table(f"{contestant}: {job.title}", rows))
        write_csv(rows, output / f"{head}.csv")
    console.print(f"Also in {output}: a CSV and a trace of each head")


if __name__ == "__main__":
    app()
