"""A data set by name, as splits `train` and `held_out` in one of TRL's formats.

The name is that of a task in `tasks.FINE_TUNING_TASKS`, of real data in `real_data.DATA_SETS`, a file, a folder or a data
set on the hub.
"""

from __future__ import annotations

from datasets import Dataset, DatasetDict
from real_data import DATA_SETS, get_real_data
from tasks import FINE_TUNING_TASKS, make_splits

from deft_plugin.report.data import CHOICES, check_texts, in_trl_format, load_splits, split_of

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
        RuntimeError: real data cannot be had.
    """
    if name in FINE_TUNING_TASKS:
        if config or columns or held_out_split or train_split != "train":
            raise ValueError(
                f"--dataset {name!r} is a task, which has no configurations, splits or columns to choose from."
            )
        return make_splits(FINE_TUNING_TASKS[name], train_rows, held_out_rows, seed)
    splits = load_splits(
        str(get_real_data(name)) if name in DATA_SETS else name,
        config,
        option="--dataset",
        config_option="--dataset-config",
        choices=f"a task ({', '.join(FINE_TUNING_TASKS)}), real data ({', '.join(DATA_SETS)}), {CHOICES}",
    )
    if held_out_split is None:
        names = [split for split in HELD_OUT_SPLITS if split in splits and split != train_split]
        held_out_split = names[0] if names else None
    train = split_of(splits, train_split, name, option="--train-split").shuffle(seed)
    if held_out_split is not None:
        held_out = split_of(splits, held_out_split, name, option="--held-out-split").shuffle(seed)
    else:
        parts = train.train_test_split(test_size=0.1, seed=seed)
        train, held_out = parts["train"], parts["test"]

    def first(rows: Dataset, count: int) -> Dataset:
        rows = in_trl_format(rows.take(min(count, len(rows))), name, columns, option="--dataset")
        check_texts(rows, name, option="--dataset")
        return rows

    return DatasetDict(train=first(train, train_rows), held_out=first(held_out, held_out_rows))
