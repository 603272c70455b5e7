"""The command `deft`: one application, and a file for each of its commands.

A command's file says what its options are, and loads what does the work when it is run, so that `deft --help` answers at
once and without torch. `errors` has the one style in which all of them fail.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import deft_plugin

from .benchmark import benchmark
from .doctor import doctor
from .errors import USAGE_ERROR, describe_usage_error, fail, may_be_cut_short
from .objectives import objectives
from .plot import plot
from .report import Report, report
from .sft import PassedOn, sft

# Without rich's boxes, which cut long lines off where the output is no terminal.
_PLAIN = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}
_NAMES = {"help_option_names": ["-h", "--help"]}


class Commands(TyperGroup):
    """The commands, in the order in which they were added."""

    def resolve_command(self, ctx, args):  # type: ignore[no-untyped-def]
        """Find a command, or say which there are."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            fail("", f"unknown command {args[0]!r}. Choices: {', '.join(self.list_commands(ctx))}.")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=Commands, context_settings=_NAMES, **_PLAIN)  # type: ignore[arg-type]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"deft_plugin {deft_plugin.__version__}")
        raise typer.Exit


@app.callback()
def deft(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Fine-tune language models with DEFT and Cayley-Trans (arXiv 2602.11424).

    \b
        deft sft --config run.yaml --loss_type deft     train
        deft report MODEL --data DATA                   what the gates would do to your data
        deft doctor run.yaml                            whether a run will train with an objective
    """


def _add(name: str, short_help: str, command: Callable[..., None], **options: Any) -> None:
    app.command(name, short_help=short_help, **options)(command)


_add("sft", "Fine-tune with TRL and an objective.", sft, cls=PassedOn)
_add("objectives", "List the objectives.", objectives)
_add("doctor", "Check an environment, YAMLs, adapters.", doctor)
_add("report", "Show what the gates do to your data.", report, cls=Report)
_add("plot", "Draw the metrics of runs.", plot)
_add("benchmark", "Measure time and memory of the loss.", benchmark)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `deft` with `arguments`, by default those of the process.

    Raises:
        SystemExit: with status 2 where it was used wrongly, 1 where something was found wrong.
    """
    # Threads that spin while they wait make the others of a busy machine slow. torch reads it when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = typer.main.get_command(app)
    with may_be_cut_short():
        try:
            status = command.main(args=given, prog_name="deft", standalone_mode=False)
        except USAGE_ERROR as error:
            path = error.ctx.command_path if error.ctx else f"deft {given[0]}"
            message = describe_usage_error(error, given)
            fail(path.removeprefix("deft").strip(), f"{message} See {path} --help.")
        except typer.Abort:  # Ctrl-C.
            raise SystemExit(130) from None
    if status:
        raise SystemExit(status)
