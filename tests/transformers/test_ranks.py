"""Two processes train and report what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deft_plugin.metrics import METRICS
from tests.distributed.ranks import run_ranks
from tests.tiny import tiny_model
from tests.transformers.running import arguments, make_trainer
from tests.updates import assert_same_update, logged, make_rows, qwen3, update_of


@pytest.mark.parametrize("bf16", [False, True], ids=["float64", "mixed precision"])
def test_ranks_train_as_one_after_an_evaluation(tmp_path: Path, bf16: bool) -> None:
    """accelerate takes a model that it has prepared for an evaluation for one with DDP."""

    def train(evaluates: bool) -> Any:
        args = arguments(tmp_path, per_device_train_batch_size=4, max_steps=2, bf16=bf16)
        model = tiny_model("qwen3") if bf16 else qwen3()
        trainer = make_trainer(args, make_rows(8), model, eval_dataset=make_rows(3, seed=3))

        def run() -> None:
            if evaluates:
                trainer.evaluate()
                trainer.evaluate()
            trainer.train()
            trainer.evaluate()

        return update_of(trainer.model, run), logged(trainer, "eval_nll")[-1]

    first, second = run_ranks(lambda rank: (train(False), train(True)), tmp_path)
    (expected, nll), _ = first
    for update, own_nll in (*first, *second):
        assert_same_update(update, expected, tolerance=1e-9)
        assert own_nll == pytest.approx(nll, rel=1e-9)


@pytest.mark.parametrize(
    ("loss_type", "loss_kwargs"),
    [("deft", {}), ("cayley_trans", {"scope": "global"}), ("cayley_trans", {"scope": "ema"})],
    ids=str,
)
def test_ranks_have_the_update_and_the_metrics_of_one_process(
    tmp_path: Path, loss_type: str, loss_kwargs: dict[str, Any]
) -> None:
    rows = make_rows(2, seed=1, shortest=3, longest=4) + make_rows(6, seed=2)
    # One rank's rows of the second step have no label that is scored.
    for row in rows[4:6]:
        row["labels"] = row["labels"][:1] + [-100] * (len(row["labels"]) - 1)

    def train(batch_size: int) -> Any:
        args = arguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,
            per_device_eval_batch_size=2,
            eval_strategy="steps",
            eval_steps=1,
            max_steps=2,
            logging_steps=2,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
        )
        # Not a multiple of what the ranks take at once: one of them repeats rows to fill up its last batch.
        trainer = make_trainer(
            args,
            rows,
            loss_type=loss_type,
            loss_kwargs=loss_kwargs,
            eval_dataset=make_rows(5, seed=3),
        )
        update = update_of(trainer.model, trainer.train)
        return trainer.state.log_history, update

    expected_log, expected = train(4)
    for log, update in run_ranks(lambda rank: train(2), tmp_path):
        assert_same_update(update, expected, tolerance=1e-9)
        assert len(log) == len(expected_log)
        compared = 0
        for actual, entry in zip(log, expected_log, strict=True):
            for name in [*METRICS, *(f"eval_{name}" for name in METRICS), "loss", "grad_norm"]:
                if name in entry:
                    assert actual[name] == pytest.approx(entry[name], rel=1e-6), name
                    compared += 1
        assert compared == 3 * len(METRICS) + 2
