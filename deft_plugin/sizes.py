"""Settings that are to be whole numbers of at least 1, and how long a training is to be.

What comes of others is an error of torch's that names none of them, or a training of nothing, or of rows without their ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

# Of transformers' training arguments.
BATCH_SIZES = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)


def check_sizes(args: Any, names: Iterable[str] = BATCH_SIZES, or_none: Iterable[str] = ()) -> None:
    """Raise `ValueError` for training arguments without a size of at least 1.

    Args:
        args: training arguments.
        names: of the sizes.
        or_none: names of those that may be None, or "auto", as TRL's pad_to_multiple_of.
    """
    for mistake in (
        *size_mistakes({name: getattr(args, name) for name in names}),
        *size_mistakes({name: getattr(args, name, None) for name in or_none}, or_none=True),
    ):
        raise ValueError(mistake)


def size_mistakes(values: Mapping[str, Any], or_none: bool = False) -> Iterator[str]:
    """What is wrong with sizes, by name, a sentence each; `or_none`: None and "auto" are no mistakes."""
    for name, size in values.items():
        is_size = isinstance(size, Integral) and int(size) >= 1
        if not is_size and not (or_none and size in (None, "auto")):
            way_out = ", or left out" if or_none else ""
            yield f"{name}={size!r} must be a whole number of at least 1{way_out}."


def length_mistakes(name: str, epochs: Any, max_steps: Any) -> Iterator[str]:
    """What is wrong with a number of epochs, the setting `name`, where no number of steps takes its place."""
    if (max_steps or 0) <= 0 and not 0 < epochs < math.inf:
        yield f"{name}={epochs!r} must be a finite number above 0, or max_steps above 0: nothing would be trained."
