"""`deft doctor`: whether an environment and a file will train with an objective."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="YAML",
            help="YAML files of Axolotl or `trl sft`, or folders of PEFT's adapters.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check versions, the device, the loss on it against its definition, and files; no model is loaded.

    The exit status is 1 where there is an error.

    \b
        deft doctor
        deft doctor run.yaml other.yaml
    """
    from ..doctor.printing import print_report

    raise SystemExit(print_report(paths or []))
