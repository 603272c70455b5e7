"""Which checkpoint `deft sft` goes on from, found before anything is loaded."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trl
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

# As YAML has them, and flags; any other text is a folder.
_LAST = ("true", "yes")
_NONE = ("none", "null", "false", "no")


def find_checkpoint(training: Any) -> str | None:
    """The checkpoint that training arguments want to go on from: a folder, or for true the last in `output_dir`.

    Raises:
        ValueError: there is none.
    """
    given = str(training.resume_from_checkpoint)
    if given.lower() in _NONE:
        return None
    if not given.strip():
        raise ValueError(
            "--resume_from_checkpoint is empty. Name a checkpoint's folder, or true for the last in output_dir, or leave it out."
        )
    is_last = given.lower() in _LAST
    named = str(training.output_dir) if is_last else given
    last = get_last_checkpoint(named) if Path(named).is_dir() else None
    checkpoint = last or named if is_last else named
    # A run's folder has that file too, and not the optimizer.
    if (Path(checkpoint) / TRAINER_STATE_NAME).is_file() and is_last == (last is not None):
        return checkpoint
    if is_last and last is None:
        lacks = "has no checkpoint"
    elif not Path(checkpoint).is_dir():
        lacks = "does not exist"
    elif last is not None and not is_last:
        lacks = f"is a run's and no checkpoint, as {last!r} is"
    else:
        lacks = f"is no whole checkpoint, since it has no {TRAINER_STATE_NAME}"
    raise ValueError(
        f"--resume_from_checkpoint {given}: the folder {checkpoint!r} {lacks}. Without the option the run begins anew."
    )


@contextmanager
def resuming_from(checkpoint: str | None) -> Iterator[None]:
    """Have TRL's trainer go on from there, with TRL 1.9 too, whose script drops the option."""
    if checkpoint is None:
        yield
        return
    cls: Any = trl.SFTTrainer
    own = vars(cls).get("train")
    cls.train = functools.partialmethod(cls.train, resume_from_checkpoint=checkpoint)
    try:
        yield
    finally:
        if own is None:
            del cls.train
        else:
            cls.train = own
