"""The folder that a report is written to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing_to(output: Path) -> Iterator[None]:
    """Raise `ValueError` where something cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--output {str(output)!r} is no folder to write to: {error}.") from None
