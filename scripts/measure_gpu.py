"""Everything that is to be measured on a GPU, in order, into one folder; what is there already is not run again.

    python scripts/measure_gpu.py                 # or: make measure-gpu, which installs the public losses first
    python scripts/measure_gpu.py --only loss     # the parts whose name starts so
    python scripts/measure_gpu.py --device cpu --shape 256,4096,64 --repetitions 1 --tests tests/ops/test_edges.py

The parts: the core's tests; every shape of the benchmark of losses; the kernels of one DEFT call; a QLoRA step of an 8B shape.
Each writes into a folder of its own: `log.txt`, its CSVs, and `done.json` once it has succeeded, with what was run, where, and
how long it took. A part is run again if its command, the code, the card or a package has changed since, or with --again. A part
that fails is named, and the next one runs.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bad_values import as_bad_parameters
from benchmark_shapes import sizes_and_masks

from deft_plugin.benchmark.contestant import PACKAGES
from deft_plugin.benchmark.job import resolve_device

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
SOURCES = ("deft_plugin", "scripts", "tests")
MEASURED_PACKAGES = ("triton", "transformers", "trl", "peft", "bitsandbytes", *PACKAGES.values())

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@dataclass(frozen=True)
class Part:
    """One command, and the name of its folder."""

    name: str
    command: list[str]


def parts(
    device: str, shapes: list[str] | None, repetitions: int, steps: int, tests: list[str]
) -> list[Part]:
    """What is run, in order: whether it is right, then how fast it is."""

    def script(name: str, *arguments: str) -> list[str]:
        return [str(SCRIPTS / name), *arguments, "--device", device]

    found = [Part("tests", ["-m", "pytest", "-q", *tests])]
    for size, masked in sizes_and_masks(device, shapes, None):
        shape = ",".join(map(str, size))
        found.append(
            Part(
                f"loss-{shape.replace(',', '-')}" + ("-masked" if masked else ""),
                script(
                    *("benchmark.py", "loss", "--shape", shape, "--masked", str(masked)),
                    *("--repetitions", str(repetitions)),
                ),
            )
        )
    profiled = ["--shape", shapes[0]] if shapes else []
    found.append(Part("profile", script("profile_call.py", *profiled)))
    found.append(Part("step", script("benchmark.py", "step", "--steps", str(steps))))
    return found


def circumstances(device: str) -> dict[str, str]:
    """What figures depend on, apart from the command: the code, the card and what is installed."""
    sources = sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    return {
        "sources": digest.hexdigest()[:12],
        "card": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "packages": ", ".join(filter(None, map(_name_and_version, MEASURED_PACKAGES))),
    }


def _name_and_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def is_done(part: Part, folder: Path, where: dict[str, str]) -> bool:
    """Whether the part has succeeded with this command in these circumstances."""
    done = folder / "done.json"
    if not done.exists():
        return False
    record = json.loads(done.read_text())
    return record["command"] == part.command and all(record[key] == where[key] for key in where)


def run_part(part: Part, folder: Path, where: dict[str, str]) -> bool:
    """Run a part into its folder; whether it succeeded."""
    folder.mkdir(parents=True, exist_ok=True)
    done, log = folder / "done.json", folder / "log.txt"
    done.unlink(missing_ok=True)
    command = [sys.executable, *part.command]
    if part.name != "tests":
        command += ["--output", str(folder.resolve())]
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - start
    if process.returncode:
        return False
    record: dict[str, Any] = {"command": part.command, **where, "seconds": round(seconds, 1)}
    done.write_text(json.dumps(record, indent=2) + "\n")
    return True


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/gpu"),
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="A part: tests, loss, profile, step, or the start of one; may be repeated."
        ),
    ] = None,
    again: Annotated[bool, typer.Option(help="Also run what is done.")] = False,
    device: Annotated[
        str, typer.Option(help="cuda, or cpu: a rehearsal of the commands.")
    ] = "cuda",
    shape: Annotated[
        list[str] | None, typer.Option(help="N,V,H; may be repeated. Default: all.")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed repetitions of a loss.")] = 9,
    steps: Annotated[int, typer.Option(min=2, help="Timed optimizer steps.")] = 8,
    tests: Annotated[list[str], typer.Option(help="What pytest runs.")] = ["tests/ops"],  # noqa: B006
) -> None:
    """Run the tests, the benchmark at all shapes, a profile and a training step."""
    with as_bad_parameters():
        device = resolve_device(device)
        chosen = parts(device, shape, repetitions, steps, tests)
    where = circumstances(device)
    for name in only or []:
        if not any(part.name.startswith(name) for part in chosen):
            names = ", ".join(repr(part.name) for part in chosen)
            raise typer.BadParameter(f"--only {name!r} starts none of: {names}.")
    chosen = [part for part in chosen if part.name.startswith(tuple(only or [""]))]
    typer.echo(f"{where['card']}, torch {where['torch']}, {where['packages']}")
    failed = []
    for part in chosen:
        folder = output / part.name
        if not again and is_done(part, folder, where):
            typer.echo(f"{part.name}: done before")
            continue
        typer.echo(f"{part.name}: {folder / 'log.txt'} ...")
        start = time.monotonic()
        succeeded = run_part(part, folder, where)
        typer.echo(f"  {'done' if succeeded else 'FAILED'} in {time.monotonic() - start:,.0f} s")
        if not succeeded:
            failed.append(part.name)
            lines = (folder / "log.txt").read_text().splitlines()
            typer.echo("\n".join(f"  | {line}" for line in lines[-10:]))
    tables = [output / part.name / "benchmark.csv" for part in chosen]
    if measured := [str(path.resolve()) for path in tables if path.exists()]:
        subprocess.run([sys.executable, str(SCRIPTS / "benchmark.py"), "summary", *measured])
    if failed:
        typer.echo(f"Failed: {', '.join(failed)}. The same command runs these again.")
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
