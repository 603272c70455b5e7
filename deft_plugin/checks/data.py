"""Data sets as a trainer is given them, and the tokens that it has made of them."""

from __future__ import annotations

import logging
from collections.abc import Sized
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from .token_counts import count_tokens
from .vocabulary import REMEDY, vocabulary_sizes

logger = logging.getLogger("deft_plugin")


def data_sets_of(name: str, dataset: Any) -> dict[str, Any]:
    """A trainer's data set, or each one of a dict, by what messages call it."""
    if not isinstance(dataset, dict):
        return {name: dataset}
    return {f"{name}[{key!r}]": part for key, part in dataset.items()}


def stored_columns(dataset: Any) -> list[str]:
    """The columns of a `datasets.Dataset`; none where a transform makes other rows of those that are stored."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return []
    return dataset.column_names or []


def check_rows(name: str, dataset: Any) -> None:
    """Raise `ValueError` for a data set, or one of a dict, without rows."""
    for each, part in data_sets_of(name, dataset).items():
        if isinstance(part, Sized) and not len(part):
            raise ValueError(f"{each} has no rows.")


def check_data(
    name: str,
    dataset: Any,
    model: PreTrainedModel,
    *,
    warn: bool = True,
    given: Any = None,
    max_length: int | None = None,
    end: int | None = None,
    left_out_above: str | None = None,
) -> None:
    """Raise `ValueError` for a data set that cannot be trained on, and warn of rows that train nothing.

    Args:
        name: what to call it in messages.
        dataset: prepared for training. Token ids of a `datasets.Dataset` are looked at; of what has none yet
            `check_batch` sees the first batch.
        model: the causal LM.
        warn: whether this process is the one that writes to the log.
        given: what the trainer prepared it from row by row, to count those that it dropped.
        max_length: what the trainer has cut rows to, leaving out those without a label then; or None.
        end: the end-of-text token, to count rows that were cut before it; or None.
        left_out_above: the setting by which longer rows have been left out or cut before the trainer was made, if any.

    Raises:
        ValueError: no rows; no token to train on in any row; ids outside the model's vocabulary; columns of
            another type, or of unequal lengths.
    """
    if "input_ids" not in stored_columns(dataset):
        return
    sizes = {
        column: size
        for column, size in vocabulary_sizes(model).items()
        if column in dataset.column_names
    }
    try:
        counts = count_tokens(dataset, sizes, max_length, end)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    dropped = 0
    if isinstance(given, Dataset) and max_length is not None:
        dropped = len(given) - counts.rows
    if not counts.rows and dropped <= 0:
        why = f" Were all longer than {left_out_above}?" if left_out_above else ""
        raise ValueError(f"{name} has no rows.{why}")
    if counts.outside:
        column, (rows, first, token) = next(iter(counts.outside.items()))
        raise ValueError(
            f"{name}: {rows:,} of {counts.rows:,} rows have {column} outside the model's vocabulary "
            f"[0, {sizes[column]:,}), the first in row {first:,}: {token:,}. {REMEDY}"
        )
    unequal, first = counts.unequal
    if unequal:
        raise ValueError(
            f"{name}: {unequal:,} of {counts.rows:,} rows have more or fewer labels than input_ids, the first being "
            f"row {first:,}."
        )
    within = "" if max_length is None else f" within max_length={max_length}"
    if counts.unscored == counts.rows:
        raise ValueError(
            f"{name}: none of its {counts.rows + max(dropped, 0):,} rows has a token to train on{within}. "
            f"Check the labels, the prompt's part of each row and {left_out_above or 'max_length'}."
        )
    if not warn:
        return
    if dropped > 0:
        logger.warning(
            "%s: %s of %s rows are left out, having no token to train on%s.",
            name,
            f"{dropped:,}",
            f"{len(given):,}",
            within,
        )
    if counts.unscored:
        logger.warning(
            "%s: %s of %s rows have no token to train on.",
            name,
            f"{counts.unscored:,}",
            f"{counts.rows:,}",
        )
    if counts.cut:
        logger.warning(
            "%s: %s of %s rows fill max_length=%s and do not end with the end-of-text token: what came after was cut "
            "off, so they do not teach where an answer ends.",
            name,
            f"{counts.cut:,}",
            f"{counts.rows:,}",
            max_length,
        )
