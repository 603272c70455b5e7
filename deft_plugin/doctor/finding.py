"""A line of the report, and how what others print is kept out of it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "note", "error"]
    text: str


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what imports and validation log out of the report."""
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
