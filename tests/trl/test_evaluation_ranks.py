"""Several processes evaluate as one does, however their last batches are filled up."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from deft_plugin import evaluation_rows, training
from tests.distributed.ranks import run_ranks
from tests.trl.running import as_dataset, config, make_trainer
from tests.trl.test_log import expected_metrics, metrics_of
from tests.updates import make_rows

# Of one length, since accelerate dispatches such rows only, and with very unequal numbers of labels.
ROWS = {"shortest": 16, "longest": 16}
COUNTS = (5, 7, 8, 3)
KINDS: dict[str, dict[str, Any]] = {
    "map-style": {},
    "map-style, split": {"split_batches": True},
    "map-style, dispatched": {"dispatch_batches": True},
    "map-style, not evened": {"even_batches": False},
    "map-style, split, not evened": {"split_batches": True, "even_batches": False},
    "stream": {},
    "stream, split": {"split_batches": True},
    "stream, sharded": {"dispatch_batches": False},
    "stream, sharded, split": {"dispatch_batches": False, "split_batches": True},
}


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def warnings() -> list[str]:
    """A list that the warnings of deft_plugin come into."""
    kept = Kept()
    logging.getLogger("deft_plugin").addHandler(kept)
    return kept.messages


def evaluated(kind: str, count: int, directory: Path, **options: Any) -> dict[str, float]:
    settings = KINDS[kind]
    # With split_batches it is the size of the batches that are split.
    batch_size = 4 if "split_batches" in settings else 2
    args = config(
        directory,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        accelerator_config=dict(settings),
        **options,
    )
    rows = as_dataset(make_rows(count, seed=3, **ROWS))
    dataset = rows.to_iterable_dataset() if kind.startswith("stream") else rows
    trainer = make_trainer(args, make_rows(4), eval_dataset=dataset)
    # Twice, so that the first does not count in the second.
    trainer.evaluate()
    metrics: dict[str, float] = trainer.evaluate()
    return metrics


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [*((kind, 2) for kind in KINDS), ("map-style", 4), ("stream", 4), ("stream, sharded", 4)],
)
def test_every_row_counts_once(tmp_path: Path, kind: str, world_size: int) -> None:
    def evaluate(rank: int) -> Any:
        return [evaluated(kind, count, tmp_path) for count in COUNTS]

    first, *_ = run_ranks(evaluate, tmp_path, world_size, timeout=120)
    for count, metrics in zip(COUNTS, first, strict=True):
        expected = expected_metrics(make_rows(count, seed=3, **ROWS))
        assert metrics_of(metrics, "eval_") == pytest.approx(expected, rel=1e-9), count


@pytest.mark.parametrize(
    "options", [{"padding_free": True, "max_length": None}, {"dataloader_num_workers": 1}], ids=str
)
def test_what_cannot_be_known_is_told(tmp_path: Path, options: dict[str, Any]) -> None:
    """Rows that are made one, and a stream that workers read."""
    kind = "map-style" if "padding_free" in options else "stream, sharded"

    def evaluate(rank: int) -> Any:
        told = warnings()
        training._warn_of_fillers.cache_clear()
        metrics = [evaluated(kind, count, tmp_path, **options) for count in (5, 8)]
        return metrics, told

    (metrics, told), (_, others) = run_ranks(evaluate, tmp_path, timeout=120)
    assert {len(told), len(others)} <= {0, 1}
    assert "count twice in its metrics" in (told + others)[0]
    # Two batches of two for each rank: there is nothing to fill up.
    expected = expected_metrics(make_rows(8, seed=3, **ROWS))
    assert metrics_of(metrics[1], "eval_") == pytest.approx(expected, rel=1e-9)


def test_ranks_are_evened_with_a_word(tmp_path: Path) -> None:
    def evaluate(rank: int) -> list[str]:
        told = warnings()
        evaluation_rows._tell_of_even_batches.cache_clear()
        evaluated("map-style, not evened", 5, tmp_path)
        return told

    (told,), others = run_ranks(evaluate, tmp_path, timeout=120)
    assert told.startswith("even_batches=False")
    assert not others
