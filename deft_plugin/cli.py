"""The command `deft`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


def main() -> None:
    """`deft sft ...` is `trl sft ...` with objectives, which `deft objectives` lists; `deft doctor` checks; `deft report` shows data."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command == "sft":
        from .trl.sft import main as sft

        sft(arguments)
    elif command == "objectives" and not arguments:
        with _may_be_cut_short():
            _list_objectives()
    elif command == "doctor":
        from .doctor import main as doctor

        with _may_be_cut_short():
            doctor(arguments)
    elif command == "report":
        from .report import main as report

        report(arguments)
    elif command in ("-h", "--help", "help", "objectives"):
        print(
            "usage: deft sft [flags and YAML of `trl sft`, with --loss_type deft]\n"
            "       deft objectives\n"
            "       deft doctor [YAML of Axolotl or `trl sft` ...]\n"
            "       deft report MODEL --data DATA --output FOLDER"
        )
    else:
        print(
            f"deft: unknown command {command!r}. Choices: sft, objectives, doctor, report.",
            file=sys.stderr,
        )
        raise SystemExit(2)


@contextlib.contextmanager
def _may_be_cut_short() -> Iterator[None]:
    """End quietly, with status 1, when the reader of the output has read enough, as `head` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes what is left when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _list_objectives() -> None:
    from .objectives import objective_names
    from .objectives.registry import describe_parameters, objective_class, summary_of

    for name in objective_names():
        cls = objective_class(name)
        summary = summary_of(cls)
        parameters = describe_parameters(cls)
        print(f"{name:14} {summary}" + (f"\n{'':14} {parameters}" if parameters else ""))


if __name__ == "__main__":
    main()
