"""Time, peak memory and error of the loss over a language model's head, against every public fused loss.

    python scripts/benchmark.py loss                     # on the GPU if there is one: all shapes, bfloat16
    python scripts/benchmark.py loss --device cpu        # the README's CPU table: N=2048, V=32768, H=512, float32
    python scripts/benchmark.py loss --shape 4096,151936,896 --only "deft_plugin deft" --only "Liger FLCE, Triton"
    python scripts/benchmark.py loss --masked 0.5        # half of the labels masked, as in training on completions
    python scripts/benchmark.py summary runs/*/benchmark.csv    # DEFT on every job: one line each, against its aims
    python scripts/benchmark.py step                     # a QLoRA training step, DEFT against TRL's own nll

Every contestant runs in a process of its own, one after the other, on the same inputs: fresh hidden states for each
repetition, and logits either as peaked as a trained model's (about half of the tokens predicted with p > 0.5)
or random. Time is the median over the repetitions, by CUDA events on a GPU: training is a forward and a backward pass, evaluation a
forward pass under no_grad. Memory is the peak in training, less what was there before, gradients included: of the allocator on a GPU,
of the resident set of an untouched process on a CPU. Error is that of the gradients against a float64 run of the contestant's formula on
256 tokens. The rows of masked labels are left out by deft_plugin, TRL and cut-cross-entropy, and computed by others.
A contestant that cannot run is named with the reason. The table also goes to a CSV and a PNG.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmark_job import (
    DTYPES,
    INPUTS,
    Job,
    check_choice,
    resolve_device,
    sizes_and_masks,
)
from benchmark_measure import work
from benchmark_tables import (
    Result,
    Results,
    read_results,
    remarks,
    results_table,
    summary_table,
    write_csv,
    write_files,
)
from contestant import Machine
from contestants import CONTESTANTS
from rich.console import Console
from rich.table import Table

# Wide enough for the table also where the output is no terminal.
console = Console(width=None if sys.stdout.isatty() else 130)
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
# Some peers compile and tune for minutes.
LIMIT_SECONDS = 1800


def run_workers(names: list[str], jobs: list[Job], limit_seconds: float = LIMIT_SECONDS) -> Results:
    """Every contestant's result on every job that it can run, each contestant in processes of its own."""
    results: Results = {job: {} for job in jobs}
    machine = Machine.here(jobs[0].device)
    for name in names:
        fit: list[Job] = []
        for job in jobs:
            if reason := CONTESTANTS[name].needs.unmet(machine, job):
                results[job][name] = {"absent": reason}
            else:
                fit.append(job)
        # The resident set of a process that has run before says nothing: on a CPU a process a job.
        size = 1 if machine.device == "cpu" else len(jobs)
        for start in range(0, len(fit), size):
            batch = fit[start : start + size]
            with console.status(f"{name}: {batch[0].title}"):
                found = run_worker(name, batch, limit_seconds)
            for job, result in zip(batch, found, strict=True):
                results[job][name] = result
    return results


def run_worker(name: str, jobs: list[Job], limit_seconds: float) -> list[Result]:
    """One contestant's results on the jobs, in a process of its own."""
    request = json.dumps({"name": name, "jobs": [asdict(job) for job in jobs]})
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__)), "worker", request],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=limit_seconds)
        last = (errors.strip() or f"exit code {process.returncode}").splitlines()[-1]
        ended = f"its process ended early: {last[:120]}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        ended = f"it was stopped after {limit_seconds:,.0f} s"
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return results + [{"absent": ended}] * (len(jobs) - len(results))


@app.command("loss")
def loss_command(
    shape: Annotated[
        list[str] | None, typer.Option(help="N,V,H; may be repeated. Default by device.")
    ] = None,
    masked: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.99,
            help="Share of the labels that is masked. Default: none, and on a GPU's own shapes half as well.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help=", ".join(DTYPES))] = None,
    inputs: Annotated[str, typer.Option(help=", ".join((*INPUTS, "both")))] = "trained",
    only: Annotated[
        list[str] | None, typer.Option(help="A contestant by name; may be repeated.")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed repetitions.")] = 9,
    limit: Annotated[
        float, typer.Option(min=1, help="Seconds after which a contestant is stopped.")
    ] = LIMIT_SECONDS,
    output: Annotated[Path, typer.Option(help="Folder for the CSV and the PNG.")] = Path(
        "runs/benchmark"
    ),
) -> None:
    """Measure the losses: a table for every shape with a trainable and with a frozen head, and a summary."""
    device = resolve_device(device)
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    check_choice("--dtype", dtype, DTYPES)
    check_choice("--inputs", inputs, (*INPUTS, "both"))
    names = only or list(CONTESTANTS)
    for name in names:
        check_choice("--only", name, tuple(CONTESTANTS))
    jobs = [
        Job(*size, frozen, dtype, kind, device, repetitions, share)
        for size, share in sizes_and_masks(device, shape, masked)
        for kind in (INPUTS if inputs == "both" else (inputs,))
        for frozen in (False, True)
    ]
    where = (
        f"{torch.get_num_threads()} CPU threads"
        if device == "cpu"
        else torch.cuda.get_device_name()
    )
    console.print(f"torch {torch.__version__}, {where}")
    results = run_workers(names, jobs, limit)
    for job, contestants in results.items():
        console.print(results_table(job, contestants))
        for line in remarks(contestants):
            console.print(f"  {line}", highlight=False)
    console.print(summary_table(results))
    write_files(results, output)
    console.print(f"Also in {output}: benchmark.csv, benchmark.png")


@app.command("summary")
def summary_command(
    csv: Annotated[list[Path], typer.Argument(exists=True, help="benchmark.csv of earlier runs.")],
) -> None:
    """DEFT on every job of earlier runs, against our nll, the fastest peer, the products and the memory's bound."""
    try:
        console.print(summary_table(read_results(csv)))
    except KeyError as error:
        raise typer.BadParameter(f"no table of this script's: it has no column {error}.") from None


@app.command("step")
def step_command(
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto.")] = "auto",
    steps: Annotated[int, typer.Option(min=2, help="Timed optimizer steps.")] = 8,
    output: Annotated[Path, typer.Option(help="Folder for step.csv.")] = Path("runs/benchmark"),
) -> None:
    """A QLoRA step through TRL's SFTTrainer: deft and cayley_trans against TRL's own nll."""
    from training_step import LOSS_TYPES, SHAPES

    device = resolve_device(device)
    shape = SHAPES[device]
    table = Table(title=f"QLoRA step: {shape.title}")
    for column in ("loss_type", "tokens/s", "ratio", "peak memory", "ratio"):
        table.add_column(column, justify="left" if column == "loss_type" else "right")
    rows: list[dict[str, Any]] = []
    for loss_type in LOSS_TYPES:
        with console.status(loss_type):
            script = Path(__file__).with_name("training_step.py")
            process = subprocess.run(
                [sys.executable, str(script), loss_type, device, str(steps)],
                capture_output=True,
                text=True,
            )
        lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
        if not lines:
            console.print(process.stderr)
            raise typer.Exit(1)
        rows.append({"loss_type": loss_type, **json.loads(lines[-1])})
    for row in rows:
        table.add_row(
            row["loss_type"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / rows[0]['tokens_per_second']:.3f}",
            f"{row['peak_mib']:,.0f} MiB",
            f"{row['peak_mib'] / rows[0]['peak_mib']:.3f}",
        )
    console.print(table)
    write_csv(rows, output / "step.csv")


@app.command("worker", hidden=True)
def worker_command(request: str) -> None:
    """Run one contestant: the other half of `loss`."""
    decoded = json.loads(request)
    work(decoded["name"], [Job(**job) for job in decoded["jobs"]])


if __name__ == "__main__":
    app()
