"""The repository's own figures of the loss: all shapes, a training step, and DEFT against its aims.

    python scripts/benchmark.py loss                     # on the GPU if there is one: all shapes, bfloat16
    python scripts/benchmark.py loss --device cpu        # the README's CPU table: N=2048, V=32768, H=512, float32
    python scripts/benchmark.py loss --shape 4096,151936,896 --only "deft_plugin deft" --only "Liger FLCE, Triton"
    python scripts/benchmark.py loss --masked 0.5        # half of the labels masked, as in training on completions
    python scripts/benchmark.py summary runs/*/benchmark.csv    # DEFT on every job: one line each, against its aims
    python scripts/benchmark.py step                     # a QLoRA training step, DEFT against TRL's own nll

`deft benchmark` measures one model's shape; what is measured, and how, is said in deft_plugin/benchmark. The tables also go to a
CSV and a PNG.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bad_values import as_bad_parameters
from benchmark_shapes import sizes_and_masks
from rich.table import Table

from deft_plugin.benchmark.contestants import CONTESTANTS, OURS
from deft_plugin.benchmark.files import read_results, write_csv, write_files
from deft_plugin.benchmark.job import (
    DTYPES,
    INPUTS,
    Job,
    check_choice,
    resolve_device,
    resolve_dtype,
)
from deft_plugin.benchmark.processes import LIMIT_SECONDS, run_workers
from deft_plugin.benchmark.tables import (
    SLACK_MIB,
    Results,
    fastest_peer,
    memory_bound_mib,
    number,
    ratios,
    remarks,
    results_table,
)
from deft_plugin.cli.console import table_console

AIMS = (
    "Aims on a GPU: at most 1.02 of our nll; at most 1.00 of the fastest peer's from V = 128,000 on; at least 85 % of\n"
    f"the products' rate; peak extra memory at most tile, gradients and {SLACK_MIB} MiB."
)

console = table_console()
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


def summary_table(results: Results) -> Table:
    """deft_plugin's DEFT on every job, against our own nll, the fastest peer, the products and the memory's bound."""
    table = Table(title=OURS, caption=AIMS)
    table.add_column("job")
    for column in ("time", "of our nll", "of the fastest peer's nll", "products' share", "memory"):
        table.add_column(column, justify="right")
    for job, contestants in results.items():
        ratio = ratios(contestants).get(OURS)
        if ratio is None:
            table.add_row(job.title, contestants.get(OURS, {}).get("absent", "not measured"))
            continue
        ours = contestants[OURS]
        peer = number(ratio.get("of_fastest_peer"), ".2f")
        table.add_row(
            job.title,
            f"{ours['seconds'] * 1000:,.1f} ms",
            number(ratio.get("of_our_nll"), ".3f"),
            f"{peer} ({fastest_peer(contestants)})" if peer != "-" else "-",
            number(ratio.get("products_share"), ".0%"),
            f"{ours['extra_mib']:,.0f} of {memory_bound_mib(job):,.0f} MiB",
        )
    return table


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
    names = only or list(CONTESTANTS)
    with as_bad_parameters():
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        check_choice("--inputs", inputs, (*INPUTS, "both"))
        for name in names:
            check_choice("--only", name, tuple(CONTESTANTS))
        sizes = sizes_and_masks(device, shape, masked)
    jobs = [
        Job(*size, frozen, dtype, kind, device, repetitions, share)
        for size, share in sizes
        for kind in (INPUTS if inputs == "both" else (inputs,))
        for frozen in (False, True)
    ]
    where = (
        f"{torch.get_num_threads()} CPU threads"
        if device == "cpu"
        else torch.cuda.get_device_name()
    )
    console.print(f"torch {torch.__version__}, {where}")
    results = run_workers(names, jobs, limit, console)
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

    with as_bad_parameters():
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


if __name__ == "__main__":
    app()
