"""Two and four processes train and report what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deft_plugin.metrics import METRICS
from tests.distributed.ranks import run_ranks
from tests.trl.running import as_dataset, config, make_trainer
from tests.updates import assert_same_update, make_rows, update_of


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("loss_type", "loss_kwargs"),
    [("deft", {}), ("cayley_trans", {"scope": "global"}), ("cayley_trans", {"scope": "ema"})],
    ids=str,
)
def test_ranks_have_the_update_and_the_metrics_of_one_process(
    tmp_path: Path, loss_type: str, loss_kwargs: dict[str, Any], world_size: int
) -> None:
    rows = make_rows(2, seed=1, shortest=3, longest=4) + make_rows(6, seed=2)
    # Not a multiple of what the ranks take at once: one of them repeats rows to fill up its last batch.
    eval_rows = make_rows(5, seed=3)
    options = {
        "loss_type": loss_type,
        "loss_kwargs": loss_kwargs,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 2,
        "logging_steps": 2,
    }
    args = config(tmp_path, per_device_train_batch_size=4, **options)
    trainer = make_trainer(args, rows, eval_dataset=as_dataset(eval_rows))
    expected = update_of(trainer.model, trainer.train)

    def train(rank: int) -> Any:
        args = config(tmp_path, per_device_train_batch_size=4 // world_size, **options)
        trainer = make_trainer(args, rows, eval_dataset=as_dataset(eval_rows))
        update = update_of(trainer.model, trainer.train)
        return trainer.state.log_history, update

    (log, update), *_ = run_ranks(train, tmp_path, world_size)
    assert_same_update(update, expected, tolerance=1e-9)
    assert len(log) == len(trainer.state.log_history)
    compared = 0
    for actual, entry in zip(log, trainer.state.log_history, strict=True):
        for name in [*METRICS, *(f"eval_{name}" for name in METRICS), "loss"]:
            if name in entry:
                assert actual[name] == pytest.approx(entry[name], rel=1e-6), name
                compared += 1
    assert compared == 3 * len(METRICS) + 1
