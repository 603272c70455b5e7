"""A data set by name: a file, a folder or a data set on the hub, in one of TRL's formats."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from trl import maybe_convert_to_chatml

FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
FORMATS = (("prompt", "completion"), ("messages",), ("conversations",), ("text",))
# What TRL gives a chat template beside the messages, and what makes it take a row for one of a vision model.
OF_THE_TEMPLATE = ("tools", "chat_template_kwargs")
IMAGES = ("image", "images")
TEXT, MESSAGES = "a text", "a list of messages"
# What each column of theirs has.
KINDS = {
    "prompt": f"{TEXT} or {MESSAGES}",
    "completion": f"{TEXT} or {MESSAGES}",
    "messages": MESSAGES,
    "conversations": MESSAGES,
    "text": TEXT,
}
CHOICES = f"a file ({', '.join(FILE_TYPES)}), a folder, a name on the hub"


def load_splits(
    name: str,
    config: str | None = None,
    *,
    option: str = "--data",
    config_option: str = "--config",
    choices: str = CHOICES,
) -> DatasetDict:
    """The splits of a data set.

    Args:
        name: a file, the folder of a saved data set or of files, or a name on the hub.
        config: the hub data set's configuration.
        option, config_option: what a user has named them with, for messages.
        choices: what `name` may be, for messages.

    Raises:
        ValueError: nothing of that name can be loaded, or it has no configurations.
    """
    path = Path(name)
    is_file = path.suffix in FILE_TYPES
    is_saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    try:
        if config and (is_file or is_saved):
            raise ValueError(f"it has no configurations, and {config_option} is {config!r}")
        if is_file:
            return load_dataset(FILE_TYPES[path.suffix], data_files=name)
        if is_saved:
            data = load_from_disk(name)
            return data if isinstance(data, DatasetDict) else DatasetDict(train=data)
        return load_dataset(name, config)
    except StopIteration:  # A JSON file without a line.
        raise ValueError(f"{option} {name!r} has no rows.") from None
    except (OSError, ValueError, EOFError, ImportError, DatasetsError) as error:
        # Before 4.8, datasets does not say which.
        if (line := broken_line(path)) is not None:
            raise ValueError(f"{option} {name!r} cannot be loaded: {line}.") from None
        # Of a file that is damaged, the cause alone says where.
        reason = textwrap.shorten(str(error.__cause__ or error), 300).rstrip(".")
        raise ValueError(
            f"{option} {name!r} cannot be loaded: {reason}. Choices: {choices}."
        ) from None


def broken_line(path: Path) -> str | None:
    """The first line that is no JSON in a .jsonl file, or in those of a folder; None without one."""
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        if file.suffix != ".jsonl" or not file.is_file():
            continue
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    if line.strip():
                        json.loads(line)
                except ValueError as error:
                    return f"{file}, line {number} is no JSON: {error}"
    return None


def split_of(splits: DatasetDict, split: str, name: str, *, option: str = "--split") -> Dataset:
    """The named split, or a `ValueError` with the choices."""
    if split not in splits:
        raise ValueError(f"{option} {split!r} is not in {name!r}. Choices: {', '.join(splits)}.")
    return splits[split]


def in_trl_format(
    data: Dataset, name: str, columns: str | None = None, *, option: str = "--data"
) -> Dataset:
    """The columns that TRL uses and no others, which would make it take one format for another.

    Args:
        data: one split.
        name: what it was loaded as, for messages.
        columns: "a,b" for a prompt and a completion, "a" for a text or a list of messages, where the
            columns do not have TRL's names.
        option: what a user has named the data set with, for messages.

    Raises:
        ValueError: no such columns, or none that TRL knows; columns of images; conversations that are none.
    """
    beside = [column for column in OF_THE_TEMPLATE if column in data.column_names]
    images = [column for column in IMAGES if column in data.column_names]
    if columns is not None:
        given = [c if c in data.column_names else c.strip() for c in columns.split(",")]
        missing = [column for column in given if column not in data.column_names]
        if missing or len(given) > 2 or len({*given}) < len(given):
            raise ValueError(
                f"--columns {columns!r} must be one or two of {name!r}'s columns: "
                f"{', '.join(data.column_names)}."
            )
        data = data.select_columns(list(dict.fromkeys([*given, *beside])))
        images = []
        single = "messages" if len(data) and isinstance(data[0][given[0]], list) else "text"
        trl_names = ["prompt", "completion"] if len(given) == 2 else [single]
        renamed = {old: new for old, new in zip(given, trl_names, strict=True) if old != new}
        data = data.rename_columns(renamed)
    for wanted in FORMATS:
        if set(wanted) <= set(data.column_names):
            if images:
                raise ValueError(
                    f"{option} {name!r} has the column {images[0]}, of a vision model's data: only text is prepared "
                    f"here. Without it, the text alone: --columns {','.join(wanted)}."
                )
            data = data.select_columns([*wanted, *beside])
            if wanted == ("conversations",):
                check_texts(data, name, option=option)
                return data.map(maybe_convert_to_chatml)
            return data
    raise ValueError(
        f"{option} {name!r} has the columns {', '.join(data.column_names)}, and one of these is needed: "
        f"{'; '.join(', '.join(wanted) for wanted in FORMATS)}. Name the columns to use with --columns."
    )


def check_texts(
    data: Dataset, name: str, numbers: Sequence[int] | None = None, *, option: str = "--data"
) -> None:
    """Raise `ValueError` where a column of one of `FORMATS` has something else than texts or messages.

    TRL would fail on it, without a word of the row.

    Args:
        data: the rows.
        name: what they were loaded as, for messages.
        numbers: of the rows in their split; None for 0, 1, ...
        option: what a user has named the data set with, for messages.
    """
    for column, kind in KINDS.items():
        if column not in data.column_names:
            continue
        for row, value in zip(numbers or range(len(data)), data[column], strict=True):
            is_messages = isinstance(value, list) and all(isinstance(each, dict) for each in value)
            # Of none TRL cannot see the format, nor a chat template make a text.
            is_messages &= bool(value)
            if not (
                (is_messages and kind != TEXT) or (isinstance(value, str) and kind != MESSAGES)
            ):
                raise ValueError(
                    f"{option} {name!r}, row {row}: {column} is {textwrap.shorten(repr(value), 100)}; it must be {kind}."
                )
    if len(data) and {"prompt", "completion"} <= {*data.column_names}:
        prompt, completion = data[0]["prompt"], data[0]["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError(
                f"{option} {name!r}: prompt and completion must both be texts or both lists of messages."
            )
