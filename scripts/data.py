"""A data set by name, as splits `train` and `held_out` in one of TRL's formats.

The name is that of a task in `tasks.FINE_TUNING_TASKS`, of real data in `real_data.DATA_SETS`, a file, a folder or a data
set on the hub.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from real_data import DATA_SETS, get_real_data
from tasks import FINE_TUNING_TASKS, make_splits
from trl import maybe_convert_to_chatml

FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
FORMATS = (("prompt", "completion"), ("messages",), ("conversations",), ("text",))
HELD_OUT_SPLITS = ("held_out", "test", "validation")


def load_data(
    name: str,
    train_rows: int,
    held_out_rows: int,
    seed: int,
    *,
    config: str | None = None,
    train_split: str = "train",
    held_out_split: str | None = None,
    columns: str | None = None,
) -> DatasetDict:
    """Splits `train` and `held_out` of at most the given numbers of rows, in an order drawn from `seed`.

    Args:
        name: what to load.
        train_rows: most rows of `train`.
        held_out_rows: most rows of `held_out`.
        seed: makes a task's questions, and draws the rows of any other data set.
        config: the hub data set's configuration.
        train_split: its split to train on.
        held_out_split: its split to measure on. By default the first of `HELD_OUT_SPLITS` that is there, else
            a tenth of `train_split`.
        columns: "a,b" for a prompt and a completion, "a" for a text or a list of messages, where the
            columns do not have TRL's names.

    Raises:
        ValueError: something of that name does not exist; the message has the choices.
    """
    if name in FINE_TUNING_TASKS:
        if config or columns or held_out_split or train_split != "train":
            raise ValueError(
                f"--dataset {name!r} is a task, which has no configurations, splits or columns to choose from."
            )
        return make_splits(FINE_TUNING_TASKS[name], train_rows, held_out_rows, seed)
    splits = _load(name, config)
    for option, split in (("--train-split", train_split), ("--held-out-split", held_out_split)):
        if split is not None and split not in splits:
            raise ValueError(
                f"{option} {split!r} is not in {name!r}. Choices: {', '.join(splits)}."
            )
    if held_out_split is None:
        names = [split for split in HELD_OUT_SPLITS if split in splits and split != train_split]
        held_out_split = names[0] if names else None
    train = splits[train_split].shuffle(seed)
    if held_out_split is not None:
        held_out = splits[held_out_split].shuffle(seed)
    else:
        parts = train.train_test_split(test_size=0.1, seed=seed)
        train, held_out = parts["train"], parts["test"]
    return DatasetDict(
        train=_formatted(train.take(min(train_rows, len(train))), name, columns),
        held_out=_formatted(held_out.take(min(held_out_rows, len(held_out))), name, columns),
    )


def _load(name: str, config: str | None) -> DatasetDict:
    if name in DATA_SETS:
        name = str(get_real_data(name))
    path = Path(name)
    is_file = path.suffix in FILE_TYPES
    is_saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    try:
        if config and (is_file or is_saved):
            raise ValueError(f"it has no configurations, and --dataset-config is {config!r}")
        if is_file:
            return load_dataset(FILE_TYPES[path.suffix], data_files=name)
        if is_saved:
            data = load_from_disk(name)
            return data if isinstance(data, DatasetDict) else DatasetDict(train=data)
        return load_dataset(name, config)
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"--dataset {name!r} cannot be loaded: {textwrap.shorten(str(error), 300).rstrip('.')}. "
            f"Choices: a task ({', '.join(FINE_TUNING_TASKS)}), real data ({', '.join(DATA_SETS)}), a file ({', '.join(FILE_TYPES)}), a folder, a "
            "name on the hub."
        ) from None


def _formatted(data: Dataset, name: str, columns: str | None) -> Dataset:
    """The columns that TRL needs and no others, which would make it take one format for another."""
    if columns is not None:
        given = columns.split(",")
        missing = [column for column in given if column not in data.column_names]
        if missing or len(given) > 2:
            raise ValueError(
                f"--columns {columns!r} must be one or two of {name!r}'s columns: "
                f"{', '.join(data.column_names)}."
            )
        data = data.select_columns(given)
        single = "messages" if isinstance(data[0][given[0]], list) else "text"
        trl_names = ["prompt", "completion"] if len(given) == 2 else [single]
        renamed = {old: new for old, new in zip(given, trl_names, strict=True) if old != new}
        data = data.rename_columns(renamed)
    for wanted in FORMATS:
        if set(wanted) <= set(data.column_names):
            data = data.select_columns(list(wanted))
            return data.map(maybe_convert_to_chatml) if wanted == ("conversations",) else data
    raise ValueError(
        f"--dataset {name!r} has the columns {', '.join(data.column_names)}, and one of these is needed: "
        f"{'; '.join(', '.join(wanted) for wanted in FORMATS)}. Name the columns to use with --columns."
    )
