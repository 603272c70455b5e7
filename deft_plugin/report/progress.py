"""Progress bars on the console, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass
class Steps:
    """Progress bars, or nothing."""

    progress: Progress | None

    @contextmanager
    def __call__(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar that the context moves."""
        if self.progress is None:
            yield lambda count: None
            return
        bar = self.progress.add_task(description, total=total)
        progress = self.progress
        yield lambda count: progress.advance(bar, count)
        # Some pictures are drawn only where there is something to see.
        progress.update(bar, completed=total)


@contextmanager
def progress_on(console: Console | None) -> Iterator[Steps]:
    """Steps that are shown on the console; None for none."""
    if console is None:
        yield Steps(None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Steps(progress)
