"""Where a command's tables are printed."""

from __future__ import annotations

import sys

from rich.console import Console


def table_console() -> Console:
    """As wide as the terminal, and wide enough for the tables where the output is none."""
    return Console(width=None if sys.stdout.isatty() else 130)
