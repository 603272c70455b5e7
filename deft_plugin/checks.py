"""What is looked at once: before training the model's weights and the tokens of the data sets, then the first batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .head.lm_head import lm_head_of, lm_head_rows

logger = logging.getLogger("deft_plugin")

Integers = npt.NDArray[np.int64]
_BATCH_ROWS = 1000
_IGNORED = -100
# Of adapters, which may name none.
_TASKS = (None, "CAUSAL_LM")
_REMEDY = (
    "Load the tokenizer that belongs to the model, or call "
    "model.resize_token_embeddings(len(tokenizer))."
)


def check_weights(model: nn.Module) -> None:
    """Raise `ValueError` where a weight of the model is NaN.

    What is quantised, sharded, partitioned away or on no device yet is not read.
    """
    for name, parameter in model.named_parameters():
        # Quantised weights are of a class of their own, some of them with a floating dtype, or 8 bits wide.
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            continue
        if parameter.element_size() < 2 or parameter.is_meta or not parameter.numel():
            continue
        # The smallest of numbers with a NaN among them is NaN, at the price of one read.
        if torch.aminmax(parameter.detach()).min.isnan():
            count = int(parameter.isnan().sum())
            raise ValueError(
                f"The weight {name} has {count:,} NaN of {parameter.numel():,} numbers: the checkpoint is "
                "damaged or was saved after training diverged. Training on it would change nothing."
            )


def check_modules_to_save(model: nn.Module) -> None:
    """Raise `ValueError` where an adapter's `modules_to_save` names what the model does not have, which PEFT passes over."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return
    # As PEFT looks for them.
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for config in configs.values():
        given = getattr(config, "modules_to_save", None)
        # For other tasks PEFT adds names of its own.
        if not isinstance(given, list | tuple | set) or config.task_type not in _TASKS:
            continue
        missing = [each for each in given if not any(name.endswith(each) for name in names)]
        if getattr(config, "trainable_token_indices", None):
            # TRL adds it for the tokens of a chat template.
            missing = [name for name in missing if name != "lm_head"]
        if missing:
            raise ValueError(
                f"modules_to_save={list(given)!r}: the model has no {', '.join(missing)}, which would be left out without a "
                f"word. It has {', '.join(_names_of_layers(model))}."
            )


def _names_of_layers(model: nn.Module) -> list[str]:
    """What the layers with weights are called, PEFT's own left out."""
    named = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
        and not any(own in name for own in ("lora_", "base_layer", "original_module", "_to_save"))
    }
    return sorted(name for name in named if not name.isdecimal())


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer itself, out of a multi-modal model's processor."""
    return getattr(processing_class, "tokenizer", processing_class)


def check_tokenizer(processing_class: Any, model: PreTrainedModel) -> None:
    """Raise `ValueError` for a tokenizer without tokens, or one that pads with a token that the model has no embedding for."""
    tokenizer = tokenizer_of(processing_class)
    # What transformers makes of a folder without a tokenizer's files.
    if isinstance(tokenizer, PreTrainedTokenizerBase) and len(tokenizer) <= len(
        {*tokenizer.all_special_ids}
    ):
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, and none but special ones: the model's folder lacks the tokenizer's "
            "files, or they are of another model. Save it there: tokenizer.save_pretrained(FOLDER)."
        )
    token = getattr(tokenizer, "pad_token_id", None)
    size = _vocabulary_sizes(model)["input_ids"]
    if token is not None and token >= size:
        raise ValueError(
            f"The tokenizer pads with token {token:,}, outside the model's vocabulary [0, {size:,}). {_REMEDY}"
        )


def _vocabulary_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Number of ids that the model has an embedding for and a logit for, by the column that holds them."""
    # Attributes, since ZeRO-3 leaves no weight to measure.
    default = model.config.get_text_config().vocab_size
    return {
        "input_ids": getattr(model.get_input_embeddings(), "num_embeddings", default),
        "labels": lm_head_rows(lm_head_of(model)),
    }


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
                wrong &= values != _IGNORED
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
        scored = _sums(values != _IGNORED, np.minimum(starts + 1, ends), ends)
        counts.unscored += int((scored == 0).sum())
        values, starts, ends = columns["input_ids"]
        if max_length is not None and end is not None:
            full = (ends - starts == max_length) & (ends > starts)
            counts.cut += int((values[ends[full] - 1] != end).sum())
    return counts


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
        for column, size in _vocabulary_sizes(model).items()
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
            f"[0, {sizes[column]:,}), the first in row {first:,}: {token:,}. {_REMEDY}"
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


def check_batch(name: str, batch: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Raise `ValueError` for a batch with ids that the model does not have, and warn of one that trains nothing.

    This also sees what `check_data` cannot: rows that the collator makes (images), streams, transforms.

    Args:
        name: of the data set.
        batch: what the model is given: `input_ids` and `labels` (batch, sequence), or `shift_labels`.
        model: the causal LM.
    """
    labels = "labels" if batch.get("labels") is not None else "shift_labels"
    sizes = _vocabulary_sizes(model)
    for column, size, others in (
        ("input_ids", sizes["input_ids"], _placeholders(model)),
        (labels, sizes["labels"], [_IGNORED]),
    ):
        ids = batch.get(column)
        if not isinstance(ids, Tensor):
            continue
        wrong = (ids < 0) | (ids >= size)
        wrong &= torch.isin(ids, torch.tensor(others, device=ids.device), invert=True)
        if wrong.any():
            raise ValueError(
                f"{name}: the first batch has {int(wrong.sum()):,} {column} outside the model's vocabulary "
                f"[0, {size:,}), the first: {int(ids[wrong][0]):,}. {_REMEDY}"
            )
    targets = batch.get("labels")
    # The first token's label is never scored. Without labels, shift_labels are a part of a sequence's.
    if isinstance(targets, Tensor) and not (targets[..., 1:] != _IGNORED).any():
        logger.warning(
            "%s: the first batch has no token to train on. Check the labels, the prompt's part of each row and "
            "max_length.",
            name,
        )


def _placeholders(model: PreTrainedModel) -> list[int]:
    """Ids in whose places a multi-modal model puts images and the like; some models have no embedding for them."""
    config = model.config
    if config.get_text_config() is config:
        return []
    return [
        value
        for name, value in vars(config).items()
        if isinstance(value, int)
        and name.endswith(("_token_id", "_token_index"))
        and not name.startswith(("pad_", "bos_", "eos_"))
    ]


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
