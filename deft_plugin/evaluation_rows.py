"""Which rows of an evaluation's batch count: those that only fill up the ranks' last batches do not.

Every rank needs as many batches of the same size as the others, since trainers gather after each. So accelerate
gives rows of the beginning a second time at the end, in a way of its own for each kind of data loader.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from torch.utils.data import BatchSampler

logger = logging.getLogger("deft_plugin")


@contextmanager
def countable(loader: Any) -> Iterator[None]:
    """Count the rows of an evaluation's stream, and see to it that no rank has fewer batches than others."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    stream: Any = getattr(loader, "dataset", None)
    is_sharded = isinstance(sampler, BatchSamplerShard)
    if is_sharded and not sampler.even_batches and _row_count(sampler.batch_sampler) is not None:
        if PartialState().is_main_process:
            _tell_of_even_batches()
        sampler.even_batches = True
    if not isinstance(stream, IterableDatasetShard):
        yield
        return
    counted = _Counted(stream.dataset)
    stream.dataset = counted
    try:
        yield
    finally:
        stream.dataset = counted.rows


def own_rows(loader: Any, rows: int) -> int | None:
    """How many of the current batch's first rows count on this rank; None where that cannot be known.

    Args:
        loader: accelerate's, in `countable`.
        rows: that the batch has, fewer than examples where packing has made one row of several.
    """
    if loader is None or not loader.end_of_dataloader:
        return rows
    if isinstance(loader, DataLoaderDispatcher):
        # Equal slices of one batch for all ranks, at the end of which its first rows may stand again.
        return _within(loader.remainder - loader.state.process_index * rows, rows)
    sampler, stream = loader.batch_sampler, loader.dataset
    shard: Any
    if isinstance(sampler, BatchSamplerShard) and sampler.even_batches:
        shard = sampler
        total = _row_count(sampler.batch_sampler)
    elif isinstance(stream, IterableDatasetShard):
        # Workers count in processes of their own.
        shard = stream
        counts = isinstance(stream.dataset, _Counted) and loader.num_workers == 0
        total = stream.dataset.count if counts else None
    else:
        return rows
    if shard.drop_last:
        return rows
    if total is None:
        return None
    at_once = shard.batch_size if shard.split_batches else shard.batch_size * shard.num_processes
    examples = at_once // shard.num_processes
    left = total % at_once or at_once
    own = _within(left - shard.process_index * examples, examples)
    if rows == examples:
        return own
    return {0: 0, examples: rows}.get(own)


class _Counted:
    """A stream that counts the rows it gives."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self.rows = rows
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        self.count = 0
        for row in self.rows:
            self.count += 1
            yield row

    def __getattr__(self, name: str) -> Any:
        # Not before it is made: pickling asks an empty object.
        if name == "rows":
            raise AttributeError(name)
        return getattr(self.rows, name)


def _row_count(sampler: Any) -> int | None:
    """How many rows there are in all batches of a sampler; None for one whose batches may be of any size."""
    if type(sampler) is BatchSampler:
        return len(sampler.sampler)  # type: ignore[arg-type]
    return getattr(sampler, "row_count", None)


@functools.cache
def _tell_of_even_batches() -> None:
    logger.warning(
        "even_batches=False gives some ranks fewer batches than others, and an evaluation gathers after each: its "
        "last batches are filled up all the same, with rows that are not counted."
    )


def _within(count: int, size: int) -> int:
    return min(max(count, 0), size)
