"""What `skip_below` gains and costs on real hidden states: time against error, share by share.

    python scripts/hidden_states.py MODEL --output runs/hidden_states/plain_text.safetensors
    python scripts/skipping.py runs/hidden_states/*.safetensors
    python scripts/skipping.py random --tokens 8192            # random logits of a 128,256-token vocabulary, on a GPU

Every share is timed, forward and backward, in turn with no skipping in one process: by CUDA events on a GPU, and on a CPU
as the time of all threads, which other work on the machine changes little. Shown is the ratio of the medians. Error is that
of the gradients, the norm of the difference over the norm, against the same call without skipping, and beside it stands
what bfloat16 logits cost. The table also goes to a CSV and a PNG.
"""

from __future__ import annotations

import process_setup  # noqa: F401

# isort: split
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deft_plugin import build_objective, gated_loss, linear_gated_loss
from deft_plugin.benchmark.files import write_csv
from deft_plugin.ops import CoreSettings
from deft_plugin.ops.projection import LogitsTransform

SHARES = (0.0, 2**-13, 2**-11, 2**-9, 2**-7, 2**-5)
RANDOM = "random"

console = Console()


@dataclass(frozen=True)
class HeadInputs:
    """What an lm_head is given: hidden (N, H), weight (V, H), targets (N,), and a softcap."""

    name: str
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    softcap: float | None = None


@dataclass(frozen=True)
class Row:
    """One share on one input with a frozen or a trainable head; errors are relative."""

    inputs: str
    objective: str
    head: str
    share: float
    milliseconds: float
    time_ratio: float
    skipped: float
    hidden_error: float
    weight_error: float | None


def load(name: str, tokens: int | None, device: str, dtype: torch.dtype) -> HeadInputs:
    """The inputs in a file of `hidden_states.py`, or random ones."""
    if name == RANDOM:
        generator = torch.Generator(device).manual_seed(1)
        vocab_size, hidden_size = (128_256, 4096) if device == "cuda" else (49_152, 576)
        options: Any = {"generator": generator, "device": device, "dtype": dtype}
        count = tokens or 2048
        hidden = torch.randn(count, hidden_size, **options)
        weight = torch.randn(vocab_size, hidden_size, **options).div_(hidden_size**0.5)
        targets = torch.randint(vocab_size, (count,), generator=generator, device=device)
        return HeadInputs(name, hidden, weight, targets)
    with safe_open(name, "pt", device) as file:
        hidden, weight, targets = (file.get_tensor(key) for key in ("hidden", "weight", "targets"))
        softcap = (file.metadata() or {}).get("softcap")
    return HeadInputs(
        Path(name).stem,
        hidden[:tokens].to(dtype),
        weight.to(dtype),
        targets[:tokens],
        None if softcap is None else float(softcap),
    )


def gradients(
    inputs: HeadInputs, objective: str, share: float, trainable: bool
) -> tuple[list[Tensor], float]:
    """The gradients of the hidden states and, if trainable, the weight; and the share that was skipped."""
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(trainable)
    result = linear_gated_loss(
        hidden, weight, inputs.targets, objective, softcap=inputs.softcap, skip_below=share
    )
    result.loss.backward()
    formed = [leaf.grad for leaf in (hidden, weight) if leaf.grad is not None]
    return formed, 0.0 if result.skipped is None else float(result.skipped.mean())


def seconds(run: Callable[[], object], device: str) -> float:
    """Time of one call: of all threads together on a CPU."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((actual.float() - exact.float()).norm() / exact.float().norm())


def measure(
    inputs: HeadInputs, objective: str, trainable: bool, shares: list[float], repetitions: int
) -> list[Row]:
    """One row a share, the first of them 0."""
    device = inputs.hidden.device.type
    results = {share: gradients(inputs, objective, share, trainable) for share in shares}
    times: dict[float, list[float]] = {share: [] for share in shares}
    for _ in range(repetitions):
        for share in shares:
            times[share].append(
                seconds(lambda share=share: gradients(inputs, objective, share, trainable), device)
            )
    exact, _ = results[0.0]
    medians = {share: statistics.median(times[share]) for share in shares}
    rows = []
    for share in shares:
        formed, skipped = results[share]
        errors = [relative_error(*pair) for pair in zip(formed, exact, strict=True)]
        rows.append(
            Row(
                inputs.name,
                objective,
                "trainable" if trainable else "frozen",
                share,
                1000 * medians[share],
                medians[share] / medians[0.0],
                skipped,
                errors[0],
                errors[1] if trainable else None,
            )
        )
    return rows


def bfloat16_error(inputs: HeadInputs, objective: str) -> float:
    """What rounding the logits to bfloat16 costs the hidden states' gradient, on 256 tokens."""
    hidden, weight = inputs.hidden[:256].float(), inputs.weight.float()
    transform = LogitsTransform(softcap=inputs.softcap)

    def gradient(logits: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        gated_loss(transform(leaf), inputs.targets[:256], objective).loss.backward()
        assert leaf.grad is not None
        return leaf.grad @ weight

    logits = hidden @ weight.T
    return relative_error(gradient(logits.bfloat16().float()), gradient(logits))


def show(given: HeadInputs, rows: list[Row]) -> None:
    """Print the table of one input."""
    table = Table(
        title=f"{given.name}: N={given.targets.numel():,} V={given.weight.size(0):,} H={given.weight.size(1):,}, "
        f"{rows[0].objective}; bfloat16 logits cost the gradient {bfloat16_error(given, rows[0].objective):.0e}"
    )
    for column in ("head", "skip_below", "time", "ratio", "left out", "error, hidden", "weight"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for row in rows:
        table.add_row(
            row.head,
            power_of_two(row.share),
            f"{row.milliseconds:,.0f} ms",
            f"{row.time_ratio:.2f}",
            f"{row.skipped:.0%}",
            f"{row.hidden_error:.1e}",
            "" if row.weight_error is None else f"{row.weight_error:.1e}",
        )
    console.print(table)


def power_of_two(share: float) -> str:
    """2^-9 for 0.001953125."""
    return f"2^{math.log2(share):.3g}" if share else "0"


def plot(rows: list[Row], path: Path) -> None:
    """Time over error, a line for each input and head that leaves anything out."""
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    left_out = [row for row in rows if row.skipped]
    colours = {
        name: f"C{index}" for index, name in enumerate(dict.fromkeys(r.inputs for r in rows))
    }
    for inputs, head in dict.fromkeys((row.inputs, row.head) for row in left_out):
        points = [row for row in left_out if (row.inputs, row.head) == (inputs, head)]
        axis.plot(
            [row.hidden_error for row in points],
            [row.time_ratio for row in points],
            color=colours[inputs],
            marker="o",
            markersize=4,
            linestyle="-" if head == "frozen" else "--",
            label=f"{inputs}, {head}",
        )
        for row in points:
            axis.annotate(
                power_of_two(row.share),
                (row.hidden_error, row.time_ratio),
                (3, 3),
                textcoords="offset points",
                fontsize=6,
                color=colours[inputs],
            )
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(
        xscale="log",
        ylim=(0, 1.1),
        xlabel="error of the hidden states' gradient",
        ylabel="time over that without skipping",
        title=f"skip_below, {rows[0].objective}",
    )
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    inputs: Annotated[
        list[str], typer.Argument(help=f"Files of scripts/hidden_states.py, or {RANDOM!r}.")
    ],
    objective: Annotated[str, typer.Option(help="The objective.")] = "deft",
    share: Annotated[list[float] | None, typer.Option(help="skip_below; may be repeated.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to use.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed repetitions.")] = 5,
    output: Annotated[Path, typer.Option(help="Folder for the CSV and the PNG.")] = Path(
        "runs/skipping"
    ),
) -> None:
    """Measure."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shares = sorted({0.0, *(share or SHARES)})
    try:
        build_objective(objective)
        for value in shares:
            CoreSettings(skip_below=value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    stems = [Path(name).stem for name in inputs]
    rows: list[Row] = []
    for name in inputs:
        if name != RANDOM and not Path(name).exists():
            raise typer.BadParameter(
                f"{name!r} is no file of scripts/hidden_states.py, nor {RANDOM!r}."
            )
        try:
            given = load(name, tokens, device, dtype)
        except (SafetensorError, KeyError) as error:
            raise typer.BadParameter(
                f"{name!r} is no file of scripts/hidden_states.py: {error}"
            ) from None
        if stems.count(given.name) > 1:
            given = replace(given, name=name)
        for trainable in track((True, False), given.name, console=console, transient=True):
            rows += measure(given, objective, trainable, shares, repetitions)
        show(given, [row for row in rows if row.inputs == given.name])
    write_csv([asdict(row) for row in rows], output / "skipping.csv")
    written = ["skipping.csv"]
    if any(row.skipped for row in rows):
        plot(rows, output / "skipping.png")
        written.append("skipping.png")
    console.print(f"Also in {output}: {', '.join(written)}")


if __name__ == "__main__":
    typer.run(main)
