"""What `deft sft` says of data that it cannot use: no such split, or files that cannot be read."""

from __future__ import annotations

from pathlib import Path

from ..report.data import broken_line
from .arguments import Arguments


def without_split(split: object, arguments: Arguments) -> str:
    """That the data have no such split, and what to do."""
    if arguments.mixture.datasets:
        return f"datasets gives no split {split!r}. test_split_size keeps a share of the rows to test on."
    file = f" ({split}.jsonl in a folder)" if str(split).isidentifier() else ""
    return (
        f"{arguments.data} has no split {split!r}. Add it{file}, or name another with --dataset_train_split and "
        "--dataset_test_split. Only with --eval_strategy is one to test on needed."
    )


def unreadable(error: BaseException, arguments: Arguments) -> str:
    """What keeps the data from being read, by the error of their reader."""
    if isinstance(error, StopIteration):
        return f"{arguments.data} cannot be read: a file has no rows."
    return why_unread(arguments) or f"{arguments.data} cannot be read: {_innermost(error)}."


def why_unread(arguments: Arguments) -> str | None:
    """The line of a folder's files that is no JSON, where there is one; before 4.8, datasets says less of it."""
    line = None if arguments.mixture.datasets else broken_line(Path(arguments.script.dataset_name))
    return f"{arguments.data} cannot be read: {line}." if line else None


def _innermost(error: BaseException) -> str:
    """The cause that is farthest down, which knows the file's line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
