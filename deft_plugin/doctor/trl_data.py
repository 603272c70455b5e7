"""The data of a YAML of `trl sft` that are in a folder here: their splits, and the first row of each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..trl.arguments import Arguments


def data_problems(arguments: Arguments) -> list[str]:
    """What `deft sft` would refuse in data that are in a folder here; they are streamed, so that nothing is stored."""
    from datasets import load_dataset

    from ..trl.columns import check_given_columns
    from ..trl.data_errors import unreadable, without_split

    script, training = arguments.script, arguments.training
    if not is_folder_here(arguments):
        return []
    splits = {"train_dataset": script.dataset_train_split}
    if training.eval_strategy != "no":
        splits["eval_dataset"] = script.dataset_test_split
    try:
        parts = load_dataset(script.dataset_name, name=script.dataset_config, streaming=True)
        for split, part in parts.items():
            # A stream reads those that it is asked for alone.
            if not script.dataset_streaming or split in splits.values():
                next(iter(part))
    except OSError as error:
        return [str(error)]
    except Exception as error:
        return [unreadable(error, arguments)]
    missing = [split for split in splits.values() if split not in parts]
    if missing:
        return [without_split(split, arguments) for split in missing]
    try:
        check_given_columns(
            {"args": training, **{name: parts[split] for name, split in splits.items()}}
        )
    except ValueError as error:
        return [str(error)]
    return []


def is_folder_here(arguments: Arguments) -> bool:
    """Whether the data are in a folder here, and are no mixture."""
    name = arguments.script.dataset_name
    return not arguments.mixture.datasets and isinstance(name, str) and os.path.isdir(name)
