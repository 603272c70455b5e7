"""What a data set's columns must be for TRL to prepare them, looked at before TRL does, whose errors name no column.

TRL decides by the first row what it is given, and so does this. Other rows are looked at where a column may hold something
else: nulls, lists of nothing, and JSON, which is what `datasets` makes of a file whose values are of several kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from ..checks import data_sets_of
from .config import HAS_FUSED_HEAD

Row = Mapping[str, Any]
_PAIR = ("prompt", "completion")
_IMAGES = {"image", "images"}
# Columns of messages: the keys by which TRL knows them, and what they are to have.
_CONVERSATIONS = {
    "messages": (("role",), "role and content"),
    "conversations": (("from", "value"), "from and value"),
}


def check_given_columns(arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` for data sets of which TRL is to make tokens and cannot.

    Args:
        arguments: of an SFTTrainer, by name.
    """
    args: Any = arguments.get("args")
    settings = getattr(args, "dataset_kwargs", None)
    prepared = isinstance(settings, dict) and settings.get("skip_prepare_dataset")
    if prepared or arguments.get("formatting_func"):
        return
    for name in ("train_dataset", "eval_dataset"):
        check_columns(
            name,
            arguments.get(name),
            getattr(args, "dataset_text_field", None) or "text",
            with_images=arguments.get("data_collator") is None,
            text_beside_images=not getattr(args, "remove_unused_columns", True),
        )


def check_columns(
    name: str,
    dataset: Any,
    text_field: str = "text",
    *,
    with_images: bool = True,
    text_beside_images: bool = True,
) -> None:
    """Raise `ValueError` for rows of which TRL cannot make tokens.

    Args:
        name: of the data set, for messages.
        dataset: as a trainer is given it; what is neither a `Dataset`, a stream nor a dict of such is not looked at.
        text_field: the column of plain text, `SFTConfig.dataset_text_field`.
        with_images: whether to look at rows with images too, which not TRL prepares but its collator reads, or the user's.
        text_beside_images: whether plain text in such rows gets to the collator; with `remove_unused_columns` TRL drops it.

    Raises:
        ValueError: several splits to train on; none of the columns that TRL takes; something else in them than text or
            messages, or now one and now the other; rows without a value.
    """
    if name == "train_dataset" and isinstance(dataset, dict):
        splits = ", ".join(map(repr, dataset))
        raise ValueError(f"train_dataset has the splits {splits}. Give one of them.")
    for each, part in data_sets_of(name, dataset).items():
        if not isinstance(part, Dataset | IterableDataset):
            continue
        row = next(iter(part), None)
        # Tokens already; tables, with which TRL does not begin.
        if not isinstance(row, Mapping) or "input_ids" in row:
            continue
        if _IMAGES & row.keys():
            if not with_images:
                continue
            if not text_beside_images:
                _check_not_text_alone(each, row, text_field)
        is_stored = isinstance(part, Dataset) and part.format["type"] != "custom"
        mixed = _mixed_columns(part, text_field) if is_stored else []
        try:
            columns = _used_columns(each, row, text_field)
            if {*columns} & {*mixed}:
                _check_every_row(each, part.select_columns(list(columns)), text_field)
        except ValueError as error:
            texts = [column for column in mixed if column not in _CONVERSATIONS]
            why = f" With values of several kinds in {' and '.join(texts)}, datasets reads a text such as '5' as a number."
            raise ValueError(f"{error}{why if texts else ''}") from None
        if is_stored:
            # TRL 1.16's reading of messages takes rows without images.
            takes_none = HAS_FUSED_HEAD and columns == ("messages",)
            images = ("image",) if takes_none else ("image", "images")
            _check_absent(each, part, (*columns, *(column for column in images if column in row)))


def _check_not_text_alone(name: str, row: Row, text_field: str) -> None:
    if text_field in row and not {"messages", "prompt"} & row.keys():
        raise ValueError(
            f"{name} has images beside {text_field}, a column that TRL drops before its collator reads it. Set "
            "remove_unused_columns=False, or give messages, or prompt and completion."
        )


def _used_columns(name: str, row: Row, text_field: str) -> tuple[str, ...]:
    """The columns that every row needs, of those that tokens are made of."""
    if _IMAGES & row.keys():
        # In the order of TRL's collator, which knows no conversations.
        for column in ("messages", text_field):
            if column in row:
                return _used_columns(name, {column: row[column]}, text_field)
        if "prompt" not in row:
            raise ValueError(
                f"{name} has the columns {_listed(row)}. With images, needed are messages, or prompt and completion. Rename "
                "them in the file, or with dataset.rename_columns."
            )
    if "prompt" in row:
        if "completion" not in row:
            raise ValueError(
                f"{name} has a column prompt and none named completion, only {_listed(row)}. Rename the one with the answers."
            )
        for column in _PAIR:
            _check_value(name, column, row[column])
        kinds = {isinstance(row[column], str) for column in _PAIR if row[column] is not None}
        if len(kinds) > 1:
            raise ValueError(
                f"{name}: prompt and completion must both be text or both be lists of messages; they hold "
                f"{_kind(row['prompt'])} and {_kind(row['completion'])}."
            )
        return _PAIR
    for column, (keys, _) in _CONVERSATIONS.items():
        if _is_conversation(row.get(column), *keys):
            # Rows without messages are then plain text.
            return () if text_field in row else (column,)
    if text_field in row:
        _check_value(name, text_field, row[text_field], or_messages=False)
        return (text_field,)
    for column, (_, needed) in _CONVERSATIONS.items():
        if row.get(column) is not None:
            raise ValueError(
                f"{name}: the column {column} holds {_kind(row[column])}, and a list of messages with {needed} is needed."
            )
        if column in row:
            return (column,)
    raise ValueError(
        f"{name} has the columns {_listed(row)}. Needed are prompt and completion, messages, conversations, "
        f"{text_field} (dataset_text_field says which), or input_ids. Rename them in the file, or with dataset.rename_columns."
    )


def _check_value(name: str, column: str, value: Any, or_messages: bool = True) -> None:
    if value is None or isinstance(value, str) or (or_messages and _is_conversation(value, "role")):
        return
    needed = "text, or a list of messages with role and content," if or_messages else "text"
    raise ValueError(f"{name}: the column {column} holds {_kind(value)}, and {needed} is needed.")


def _is_conversation(value: Any, *keys: str) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) for message in value)
        and all(key in value[0] for key in keys)
    )


def _kind(value: Any) -> str:
    """What a value is, with its keys where it is a list of dicts."""
    if _is_conversation(value):
        return f"a list with {', '.join(map(str, value[0]))}"
    return f"{value!r:.40} ({type(value).__name__})"


def _mixed_columns(dataset: Dataset, text_field: str) -> list[str]:
    """Columns that TRL may use whose values are of several kinds: of such files `datasets` makes a column of JSON."""
    names = (*_PAIR, *_CONVERSATIONS, text_field)
    return [name for name in names if "Json(" in str(dataset.features.get(name))]


def _check_every_row(name: str, dataset: Dataset, text_field: str) -> None:
    before: set[bool] = set()
    for number, row in enumerate(dataset.with_format(None)):
        where = f"{name}, row {number:,}"
        _used_columns(where, row, text_field)
        is_text = {isinstance(value, str) for value in row.values() if value is not None}
        if len(before | is_text) > 1:
            here, there = ("text", "messages") if True in is_text else ("messages", "text")
            raise ValueError(
                f"{where}: {_listed(row)} hold {here}, and {there} in the rows before it."
            )
        before |= is_text


def _check_absent(name: str, dataset: Dataset, columns: tuple[str, ...]) -> None:
    for column in columns:
        # Of all that is stored, selected or not.
        if not pc.any(_is_absent(column, dataset.data.column(column))).as_py():
            continue
        rows = _is_absent(column, dataset.select_columns([column]).with_format("arrow")[:][column])
        if count := pc.sum(rows).as_py():
            first = pc.index(rows, True).as_py()
            raise ValueError(
                f"{name}: {count:,} of {len(rows):,} rows have no {column}, the first being row {first:,}, "
                "counted from 0. Leave them out of the file, or with dataset.filter."
            )


def _is_absent(column: str, values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether each value is null, or a list of no messages; a list of no images is a row of text alone."""
    if column in _IMAGES:
        return pc.is_null(values)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return pc.equal(pc.fill_null(pc.list_value_length(values), 0), 0)
    return pc.is_null(values)


def _listed(row: Row) -> str:
    return ", ".join(map(str, row))
