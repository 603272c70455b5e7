"""What a script says of a value that the package refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def as_bad_parameters() -> Iterator[None]:
    """A `ValueError` in this context as a usage error, which ends the script with status 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
