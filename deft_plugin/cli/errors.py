"""One style of errors for every command: a line on stderr that begins with the command's name, and a status.

Status 2 is for what was asked in a way that cannot be done, 1 for something that was looked at and found wrong. What is no
fault of the user's keeps its traceback.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

import typer

# click's UsageError; newer versions of typer have a click of their own, and give no other way to it.
USAGE_ERROR: Any = typer.BadParameter.__base__


def fail(command: str, message: str, status: int = 2) -> NoReturn:
    """End the process with a line on stderr.

    Args:
        command: without `deft`; "" for `deft` itself.
        message: what is wrong: the option, its value, the choices.
        status: of the process.
    """
    print(f"{f'deft {command}'.strip()}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def describe_usage_error(error: Any, arguments: Sequence[str]) -> str:
    """What click says is wrong, with the value that was given, which it does not always name.

    Args:
        error: a `USAGE_ERROR`.
        arguments: of the process.
    """
    message: str = error.format_message()
    for option in getattr(getattr(error, "param", None), "opts", ()):
        for argument, following in itertools.pairwise([*arguments, ""]):
            name, _, value = argument.partition("=")
            if name == option:
                message = f"{option} {(value or following)!r}: {error.message}"
    return f"{message.rstrip('.')}."


@contextlib.contextmanager
def usage_errors(command: str) -> Iterator[None]:
    """A `ValueError` in this context is one of the user's."""
    try:
        yield
    except ValueError as error:
        fail(command, str(error))


def need(command: str, extra: str, packages: tuple[str, ...]) -> None:
    """Fail where a package is missing, with the extra that has it."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        fail(command, f'needs {", ".join(missing)}: pip install "deft_plugin[{extra}]"')


@contextlib.contextmanager
def may_be_cut_short() -> Iterator[None]:
    """End quietly, with status 1, when the reader of the output has read enough, as `head` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            # Python flushes what is left when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        raise  # Another pipe: a data loader's, for one.
