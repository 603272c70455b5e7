"""What a data set's columns must be for TRL to prepare them, looked at before TRL does, whose errors name no column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, Value

from ..checks import data_sets_of

_TEXTS = ("string", "large_string")


def check_columns(name: str, dataset: Any, text_field: str = "text") -> None:
    """Raise `ValueError` for rows of which TRL cannot make tokens.

    Args:
        name: of the data set, for messages.
        dataset: as a trainer is given it; what is neither a `Dataset`, a stream nor a dict of such is not looked at.
        text_field: the column of plain text, `SFTConfig.dataset_text_field`.

    Raises:
        ValueError: several splits to train on; none of the columns that TRL takes; numbers in place of text; rows
            without a value.
    """
    if name == "train_dataset" and isinstance(dataset, dict):
        splits = ", ".join(map(repr, dataset))
        raise ValueError(f"train_dataset has the splits {splits}. Give one of them.")
    for each, part in data_sets_of(name, dataset).items():
        if isinstance(part, Dataset) and part.format["type"] != "custom":
            used = _used_columns(each, part.column_names, text_field)
            _check_types(each, part, used)
            _check_nulls(each, part, used)
        elif isinstance(part, IterableDataset):
            # TRL too reads its first row to see what it has.
            _used_columns(each, list(next(iter(part), {})), text_field)


def _used_columns(name: str, columns: Sequence[str], text_field: str) -> Sequence[str]:
    """The columns that tokens are made of; none where they are tokens already, or images that a collator reads."""
    if not columns or {"input_ids", "image", "images"} & {*columns}:
        return ()
    if "prompt" in columns and "completion" not in columns:
        raise ValueError(
            f"{name} has a column prompt and none named completion, only {_listed(columns)}. Rename the one with the "
            "answers."
        )
    for form in (("prompt", "completion"), ("messages",), ("conversations",), (text_field,)):
        if form[0] in columns:
            return form
    raise ValueError(
        f"{name} has the columns {_listed(columns)}. Needed are prompt and completion, messages, {text_field} "
        "(dataset_text_field says which), or input_ids. Rename them in the file, or with dataset.rename_columns."
    )


def _check_types(name: str, dataset: Dataset, columns: Iterable[str]) -> None:
    for column in columns:
        kind = dataset.features[column]
        if not isinstance(kind, Value) or kind.dtype == "null":
            continue
        conversation = column in ("messages", "conversations")
        if conversation or kind.dtype not in _TEXTS:
            needed = "a list of messages" if conversation else "text, or messages,"
            raise ValueError(
                f"{name}: the column {column} holds {kind.dtype}, and {needed} is needed."
            )


def _check_nulls(name: str, dataset: Dataset, columns: Iterable[str]) -> None:
    for column in columns:
        # Of all that is stored, selected or not.
        if not dataset.data.column(column).null_count:
            continue
        rows = dataset.select_columns([column]).with_format("arrow")[:][column]
        if rows.null_count:
            first = pc.index(pc.is_null(rows), True).as_py()
            raise ValueError(
                f"{name}: {rows.null_count:,} of {len(rows):,} rows have no {column}, the first being row {first:,}, "
                "counted from 0. Leave them out of the file, or with dataset.filter."
            )


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns)
