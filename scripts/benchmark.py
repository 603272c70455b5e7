"""Time, peak memory and error of the loss over a language model's head, against every public fused loss.

    python scripts/benchmark.py loss                     # on the GPU if there is one: all shapes, bfloat16
    python scripts/benchmark.py loss --device cpu        # the README's CPU table: N=2048, V=32768, H=512, float32
    python scripts/benchmark.py loss --shape 4096,151936,896 --only "deft_plugin deft" --only "Liger FLCE"
    python scripts/benchmark.py step                     # a QLoRA training step, DEFT against TRL's own nll

Every contestant runs in a process of its own, one after the other, on the same inputs: fresh hidden states for each
repetition, and logits either as peaked as a trained model's (about half of the tokens predicted with p > 0.5)
or random. Time is the median over the repetitions, by CUDA events on a GPU. Memory is the peak during one forward and
backward, less what was there before, gradients included: of the allocator on a GPU, of the resident set of an
untouched process on a CPU. Error is that of the gradients against a float64 run of the contestant's formula on
the first 256 tokens. A contestant that cannot run is named with the reason. The table also goes to a CSV and a PNG.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contestants import CONTESTANTS, FORMULA, Loss, UnavailableError, formula
from rich.console import Console
from rich.table import Table
from torch import Tensor

# (N, V, H): tokens, vocabulary, hidden size.
GPU_SHAPES = (
    "8192,32000,4096",
    "8192,128256,4096",
    "8192,151936,3584",
    "16384,248320,2048",
    "4096,262144,2304",
    "65536,128256,4096",
)
CPU_SHAPES = ("2048,32768,512",)
DTYPES = ("float32", "bfloat16", "float16")
INPUTS = ("trained", "random")
PRODUCTS = "matrix products alone"

# Wide enough for the table also where the output is no terminal.
console = Console(width=None if sys.stdout.isatty() else 110)
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@dataclass(frozen=True)
class Job:
    """One measurement: N tokens, V logits per token, H hidden units."""

    tokens: int
    vocab: int
    hidden: int
    frozen: bool
    dtype: str
    inputs: str
    device: str
    repetitions: int

    @property
    def title(self) -> str:
        """What the table is headed by."""
        return (
            f"N={self.tokens:,} V={self.vocab:,} H={self.hidden:,} {self.dtype}, "
            f"{'frozen' if self.frozen else 'trainable'} head, {self.inputs} logits"
        )


def make_inputs(job: Job, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the weight and the targets; hidden states lean to their target if "trained"."""
    generator = torch.Generator(job.device).manual_seed(seed)
    options: Any = {"generator": generator, "device": job.device}
    dtype = getattr(torch, job.dtype)
    weight = torch.randn(job.vocab, job.hidden, dtype=dtype, **options).div_(job.hidden**0.5)
    targets = torch.randint(job.vocab, (tokens,), **options)
    hidden = torch.randn(tokens, job.hidden, **options)
    if job.inputs == "trained":
        lean = 25 * torch.rand(tokens, 1, **options)
        hidden += lean * weight[targets].float()
    return hidden.to(dtype), weight, targets


def gradients(
    loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, frozen: bool
) -> list[Tensor]:
    """One forward and backward; the gradients of the hidden states and, unless frozen, the weight."""
    leaves = [hidden.detach().requires_grad_()]
    weight = weight.detach().requires_grad_(not frozen)
    if not frozen:
        leaves.append(weight)
    loss(leaves[0], weight, targets).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def median_seconds(run: Callable[[int], object], repetitions: int, device: str) -> float:
    """Median time of `run(repetition)`."""
    times = []
    for repetition in range(repetitions):
        if device == "cpu":
            start = time.perf_counter()
            run(repetition)
            times.append(time.perf_counter() - start)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(repetition)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def peak_extra_mib(run: Callable[[], object], device: str) -> float:
    """Highest memory during `run` less the memory before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    resident = _resident_kib("VmRSS")
    run()
    return (_resident_kib("VmHWM") - resident) / 1024


def _resident_kib(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its highest since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"{field} is not in /proc/self/status: the CPU benchmark needs Linux.")


def measure(name: str, loss: Loss, job: Job) -> dict[str, float]:
    """Measure one contestant in this process."""
    small = Job(**{**asdict(job), "tokens": 64, "vocab": 1024, "hidden": 64})
    gradients(loss, *make_inputs(small, 64, 1), job.frozen)
    rotation = [make_inputs(job, job.tokens, seed) for seed in range(3)]
    if job.device != "cpu":
        # A GPU's allocator counts exactly; what is compiled or tuned for these shapes must not be timed.
        for inputs in rotation:
            gradients(loss, *inputs, job.frozen)
    extra = peak_extra_mib(lambda: gradients(loss, *rotation[0], job.frozen), job.device)
    both = median_seconds(
        lambda i: gradients(loss, *rotation[(i + 1) % 3], job.frozen), job.repetitions, job.device
    )
    with torch.no_grad():
        loss(*rotation[0])
        forward = median_seconds(
            lambda i: loss(*rotation[(i + 1) % 3]), job.repetitions, job.device
        )
    objective = CONTESTANTS[name].objective
    error = 0.0
    if objective:
        checked = make_inputs(job, 256, 9)
        exact = gradients(
            formula(objective), checked[0].double(), checked[1].double(), checked[2], job.frozen
        )
        for ours, truth in zip(gradients(loss, *checked, job.frozen), exact, strict=True):
            error = max(error, float((ours.double() - truth).norm() / truth.norm()))
    return {"seconds": both, "forward_seconds": forward, "extra_mib": extra, "error": error}


def work(name: str, jobs: list[Job]) -> None:
    """Measure one contestant on all jobs; a line of JSON each."""
    try:
        loss = CONTESTANTS[name].build(jobs[0].device)
    except UnavailableError as reason:
        for _ in jobs:
            print(json.dumps({"absent": str(reason)}), flush=True)
        return
    for job in jobs:
        try:
            result: dict[str, Any] = measure(name, loss, job)
        except torch.OutOfMemoryError:
            result = {"absent": "out of memory"}
        except Exception as error:  # A peer's own failure is a result too.
            reason = (str(error).strip() or "no message").splitlines()[0]
            result = {"absent": f"{type(error).__name__}: {reason[:120]}"}
        print(json.dumps(result), flush=True)
        if job.device != "cpu":
            torch.cuda.empty_cache()


def run_workers(names: list[str], jobs: list[Job]) -> dict[Job, dict[str, dict[str, Any]]]:
    """Every contestant's result on every job, each contestant in processes of its own."""
    results: dict[Job, dict[str, dict[str, Any]]] = {job: {} for job in jobs}
    # The resident set of a process that has run before says nothing: on a CPU a process a job.
    batches = [[job] for job in jobs] if jobs[0].device == "cpu" else [jobs]
    for name in names:
        for batch in batches:
            with console.status(f"{name}: {batch[0].title}"):
                request = json.dumps({"name": name, "jobs": [asdict(job) for job in batch]})
                process = subprocess.run(
                    [sys.executable, __file__, "worker", request], capture_output=True, text=True
                )
            lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
            ended = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
            for index, job in enumerate(batch):
                missing = {"absent": f"its process ended early: {ended[:120]}"}
                results[job][name] = json.loads(lines[index]) if index < len(lines) else missing
    return results


def results_table(job: Job, results: dict[str, dict[str, Any]]) -> Table:
    """Figures of all contestants on one job, as ratios to the formula on full logits."""
    table = Table(title=job.title)
    table.add_column("loss", no_wrap=True)
    for column in ("fwd + bwd", "ratio", "forward", "TFLOP/s", "peak extra", "ratio", "error"):
        table.add_column(column, justify="right")
    base = results.get(FORMULA, {})
    products = 2 if job.frozen else 3
    for name, result in results.items():
        if "absent" in result:
            continue
        rate = 2 * products * job.tokens * job.vocab * job.hidden / result["seconds"] / 1e12
        time_ratio = memory_ratio = "-"
        if "seconds" in base:
            time_ratio = f"{result['seconds'] / base['seconds']:.2f}"
            memory_ratio = f"1/{base['extra_mib'] / max(result['extra_mib'], 0.1):.1f}"
        table.add_row(
            name,
            f"{result['seconds'] * 1000:,.1f} ms",
            time_ratio,
            f"{result['forward_seconds'] * 1000:,.1f} ms",
            f"{rate:,.2f}",
            f"{result['extra_mib']:,.0f} MiB",
            memory_ratio,
            f"{result['error']:.1e}" if result["error"] else "-",
        )
    return table


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """The rows, whose keys may differ, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def write_files(results: dict[Job, dict[str, dict[str, Any]]], output: Path) -> None:
    """The results as benchmark.csv and benchmark.png in `output`."""
    rows = [
        {**asdict(job), "contestant": name, **result}
        for job, contestants in results.items()
        for name, result in contestants.items()
    ]
    write_csv(rows, output / "benchmark.csv")
    plot(results, output / "benchmark.png")


def plot(results: dict[Job, dict[str, dict[str, Any]]], path: Path) -> None:
    """Bars of time and of memory for every job."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(results), 2, figsize=(12, 1 + 2.6 * len(results)), squeeze=False, layout="constrained"
    )
    for (job, contestants), (left, right) in zip(results.items(), axes, strict=True):
        present = {name: result for name, result in contestants.items() if "absent" not in result}
        names = list(present)[::-1]
        colours = ["C1" if name.startswith("deft_plugin") else "C7" for name in names]
        left.barh(names, [present[name]["seconds"] * 1000 for name in names], color=colours)
        left.set_title(f"{job.title}: ms", fontsize=8)
        right.barh(names, [present[name]["extra_mib"] for name in names], color=colours)
        right.set_title("peak extra memory, MiB", fontsize=8)
        right.set_yticklabels([])
        for axis in (left, right):
            axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_shape(text: str) -> tuple[int, int, int]:
    """N,V,H as three integers."""
    try:
        tokens, vocab, hidden = (int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"--shape {text!r} must be N,V,H: tokens, vocabulary and hidden size."
        ) from None
    if min(tokens, vocab, hidden) < 1:
        raise typer.BadParameter(f"--shape {text!r}: every number must be at least 1.")
    return tokens, vocab, hidden


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise typer.BadParameter(
            f"{option} {value!r} is not one of: {', '.join(map(repr, choices))}."
        )


def resolve_device(device: str) -> str:
    """What --device means here: "cuda" or "cpu"."""
    check_choice("--device", device, ("auto", "cuda", "cpu"))
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device 'cuda': there is no GPU here.")
    return device


@app.command("loss")
def loss_command(
    shape: Annotated[
        list[str] | None, typer.Option(help="N,V,H; may be repeated. Default by device.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help=", ".join(DTYPES))] = None,
    inputs: Annotated[str, typer.Option(help=", ".join((*INPUTS, "both")))] = "trained",
    only: Annotated[
        list[str] | None, typer.Option(help="A contestant by name; may be repeated.")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed repetitions.")] = 9,
    output: Annotated[Path, typer.Option(help="Folder for the CSV and the PNG.")] = Path(
        "runs/benchmark"
    ),
) -> None:
    """Measure the losses: a table for every shape with a trainable and with a frozen head."""
    device = resolve_device(device)
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    check_choice("--dtype", dtype, DTYPES)
    check_choice("--inputs", inputs, (*INPUTS, "both"))
    names = only or list(CONTESTANTS)
    for name in names:
        check_choice("--only", name, tuple(CONTESTANTS))
    shapes = [
        parse_shape(text) for text in shape or (CPU_SHAPES if device == "cpu" else GPU_SHAPES)
    ]
    jobs = [
        Job(*size, frozen, dtype, kind, device, repetitions)
        for size in shapes
        for kind in (INPUTS if inputs == "both" else (inputs,))
        for frozen in (False, True)
    ]
    where = (
        f"{torch.get_num_threads()} CPU threads"
        if device == "cpu"
        else torch.cuda.get_device_name()
    )
    console.print(f"torch {torch.__version__}, {where}")
    results = run_workers(names, jobs)
    for job, contestants in results.items():
        console.print(results_table(job, contestants))
        for name, result in contestants.items():
            if "absent" in result:
                console.print(f"  not measured: {name}: {result['absent']}")
    write_files(results, output)
    console.print(f"Also in {output}: benchmark.csv, benchmark.png")


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
