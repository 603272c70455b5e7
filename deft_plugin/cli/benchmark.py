"""`deft benchmark`: what the loss costs on this machine, beside others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import fail, need, usage_errors

if TYPE_CHECKING:
    from ..benchmark.job import Job

_HEADS = ("both", "trainable", "frozen")
# On a CPU a token takes as long as a thousand on a GPU.
_TOKENS = {"cuda": 8192, "cpu": 512}


def benchmark(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model's folder or its name on the hub, for its vocabulary and hidden size.",
            show_default=False,
        ),
    ] = None,
    vocab: Annotated[
        int | None, typer.Option(min=2, help="Vocabulary, in place of MODEL's.")
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Hidden size, in place of MODEL's.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a micro-batch; by default 8192 on a GPU, 512 on a CPU."
        ),
    ] = None,
    masked: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of the labels that is masked.")
    ] = 0.0,
    head: Annotated[
        str, typer.Option(help=f"Which lm_head, as a run would have it: {', '.join(_HEADS)}.")
    ] = "both",
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; by default bfloat16 on a GPU, float32 on a CPU."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A contestant by name; may be repeated.")
    ] = None,
    everyone: Annotated[
        bool,
        typer.Option(
            "--all", help="All contestants on a CPU too, where by default only four are measured."
        ),
    ] = False,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed repetitions.")] = 5,
    limit: Annotated[
        float, typer.Option(min=1, help="Seconds after which a contestant is stopped.")
    ] = 600,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for benchmark.csv and benchmark.png; by default none."),
    ] = None,
) -> None:
    """Measure time and memory of the loss on this machine, for the lm_head of a model or of the sizes given.

    Beside it: its formula on full logits, torch's cross-entropy, and each public fused loss that is installed; on a CPU
    without --all, TRL's alone. The rest are named with what they need.

    \b
        deft benchmark Qwen/Qwen3-0.6B --tokens 4096
        deft benchmark --vocab 32000 --hidden 2048 --head frozen --only "deft_plugin deft" --only "torch cross_entropy"
    """
    if output is not None:
        need("benchmark", "report", ("matplotlib",))
    import torch
    from rich.console import Console

    from ..benchmark.contestants import CONTESTANTS
    from ..benchmark.files import write_files
    from ..benchmark.job import check_choice, resolve_device, resolve_dtype
    from ..benchmark.processes import run_workers
    from ..benchmark.tables import remarks, results_table
    from .console import table_console

    with usage_errors("benchmark"):
        if only and everyone:
            raise ValueError("--only and --all are given. Leave one of them out.")
        if output is not None and output.exists() and not output.is_dir():
            raise ValueError(f"--output {str(output)!r} is a file; it must be a folder.")
        check_choice("--head", head, _HEADS)
        for name in only or ():
            check_choice("--only", name, tuple(CONTESTANTS))
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        sizes = (tokens or _TOKENS[device], *_vocab_and_hidden(model, vocab, hidden))
    jobs = _jobs(sizes, head, dtype, device, repetitions, masked)
    console = table_console()
    on = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    console.print(f"torch {torch.__version__}, {device}: {on}", highlight=False)
    left_out = _left_out(jobs) if device == "cpu" and not (only or everyone) else []
    if left_out:
        named = "; ".join(left_out)
        console.print(
            f"left out on a CPU, --all measures them too: {named}", highlight=False, soft_wrap=True
        )
    names = only or [name for name in CONTESTANTS if name not in left_out]
    results = run_workers(names, jobs, limit, Console(stderr=True))
    for job, found in results.items():
        console.print(results_table(job, found))
        for line in remarks(found):
            console.print(f"  {line}", highlight=False)
    if output is not None:
        write_files(results, output)
        console.print(f"Also in {output}: benchmark.csv, benchmark.png", highlight=False)
    if not any("seconds" in result for found in results.values() for result in found.values()):
        fail("benchmark", "nothing could be measured.", status=1)


def _left_out(jobs: list[Job]) -> list[str]:
    """Who could run on this CPU and does not by default."""
    from ..benchmark.contestant import Machine
    from ..benchmark.contestants import CONTESTANTS, FEWER

    machine = Machine.here("cpu")
    return [
        name
        for name, contestant in CONTESTANTS.items()
        if name not in FEWER and any(not contestant.needs.unmet(machine, job) for job in jobs)
    ]


def _vocab_and_hidden(model: str | None, vocab: int | None, hidden: int | None) -> tuple[int, int]:
    if model is None:
        if vocab is None or hidden is None:
            raise ValueError("Name a MODEL, or its sizes with --vocab and --hidden.")
        return vocab, hidden
    from ..benchmark.shape import shape_of_model

    own_vocab, own_hidden = shape_of_model(model)
    return vocab or own_vocab, hidden or own_hidden


def _jobs(
    sizes: tuple[int, int, int],
    head: str,
    dtype: str,
    device: str,
    repetitions: int,
    masked: float,
) -> list[Job]:
    from ..benchmark.job import Job

    heads = {"both": (False, True), "trainable": (False,), "frozen": (True,)}[head]
    return [Job(*sizes, frozen, dtype, "trained", device, repetitions, masked) for frozen in heads]
