"""What a data set of token ids holds, counted in one walk through its columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .vocabulary import IGNORED

Integers = npt.NDArray[np.int64]
_BATCH_ROWS = 1000


@dataclass
class TokenCounts:
    """What a data set of token ids holds.

    Attributes:
        rows: number of rows.
        unscored: rows without a label that is scored; the first token's never is.
        cut: rows as long as `max_length` that do not end with the end-of-text token.
        outside: tokens that the model has no embedding for, and labels that it has no logit for, by column:
            number of rows, first row, first id.
        unequal: rows with more or fewer labels than tokens: number, first row.
    """

    rows: int = 0
    unscored: int = 0
    cut: int = 0
    outside: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    unequal: tuple[int, int] = (0, -1)


def count_tokens(
    dataset: Dataset, sizes: Mapping[str, int], max_length: int | None, end: int | None
) -> TokenCounts:
    """Go through the columns `input_ids` and `labels` once.

    Args:
        dataset: prepared for training.
        sizes: number of ids that a column may hold, by column.
        max_length: what rows were cut to, or None.
        end: the end-of-text token, or None.

    Raises:
        ValueError: a column holds anything else than lists of integers.
    """
    counts = TokenCounts()
    for start, columns in _lists(dataset, list(sizes)):
        for name, (values, starts, ends) in columns.items():
            wrong = (values < 0) | (values >= sizes[name])
            if name == "labels":
                wrong &= values != IGNORED
            per_row = _sums(wrong, starts, ends)
            if per_row.any():
                rows, first, token = counts.outside.get(name, (0, -1, 0))
                if not rows:
                    first = start + int(per_row.argmax())
                    token = int(values[wrong.argmax()])
                counts.outside[name] = (rows + int((per_row > 0).sum()), first, token)
        lengths = [ends - starts for _, starts, ends in columns.values()]
        unequal = lengths[0] != lengths[-1]
        if unequal.any():
            count, first = counts.unequal
            first = first if count else start + int(unequal.argmax())
            counts.unequal = (count + int(unequal.sum()), first)
        values, starts, ends = columns.get("labels", columns["input_ids"])
        counts.rows += len(starts)
        scored = _sums(values != IGNORED, np.minimum(starts + 1, ends), ends)
        counts.unscored += int((scored == 0).sum())
        values, starts, ends = columns["input_ids"]
        if max_length is not None and end is not None:
            full = (ends - starts == max_length) & (ends > starts)
            counts.cut += int((values[ends[full] - 1] != end).sum())
    return counts


def _lists(
    dataset: Dataset, names: list[str]
) -> Iterator[tuple[int, dict[str, tuple[Integers, Integers, Integers]]]]:
    """Row number of each batch, and its columns: all values, and where each row's begin and end.

    Raises:
        ValueError: a column of anything else than lists of integers.
    """
    start = 0
    for table in dataset.select_columns(names).with_format("arrow").iter(_BATCH_ROWS):
        columns = {}
        for name in names:
            column = table[name].combine_chunks()
            if not _is_list(column.type) or not pa.types.is_integer(column.type.value_type):
                raise ValueError(f"{name} holds {column.type}, and lists of integers are needed.")
            values = column.flatten()
            if column.null_count or values.null_count:
                raise ValueError(
                    f"{name} has nulls among rows {start:,} to {start + len(table) - 1:,}."
                )
            lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
            ends = np.cumsum(lengths, dtype=np.int64)
            values = values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
            columns[name] = (values, ends - lengths, ends)
        yield start, columns
        start += len(table)


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _sums(flags: npt.NDArray[np.bool_], starts: Integers, ends: Integers) -> Integers:
    """How many flags each row has."""
    totals = np.concatenate(([0], np.cumsum(flags, dtype=np.int64)))
    return totals[ends] - totals[starts]
