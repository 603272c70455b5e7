"""Evaluations and predictions: the cases of transformers' own tests of its trainer, with the figures of the formula."""

from __future__ import annotations

import logging
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer

from deft_plugin import GatedTrainer
from deft_plugin import trainer as trainer_module
from deft_plugin.metrics import METRICS
from tests.formula_metrics import formula_metrics
from tests.tiny import tiny_model
from tests.transformers.running import arguments, make_trainer
from tests.updates import Rows, formula_mean, label_logits, logged, make_rows, qwen3

SHORT, LONG = {"shortest": 3, "longest": 4}, {"shortest": 25, "longest": 30}
ROWS = make_rows(4, seed=1, **SHORT) + make_rows(3, seed=2, **LONG)


def metrics_of(entry: dict[str, float], prefix: str = "") -> dict[str, float]:
    return {name: entry[prefix + name] for name in METRICS if prefix + name in entry}


def expected_metrics(rows: Rows, name: str = "deft") -> dict[str, float]:
    return formula_metrics(*label_logits(qwen3(), rows), name)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Rows without a length."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_training_window_is_weighted_by_token_over_micro_batches_and_steps(tmp_path: Path) -> None:
    args = arguments(
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=8,
        logging_steps=4,
        # So that every pass over the rows has the same metrics.
        learning_rate=0.0,
        # Evaluations, and what they leave in the log, come between.
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
    )
    rows = ROWS + make_rows(1)
    trainer = make_trainer(args, rows, eval_dataset=ROWS)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert metrics_of(entry) == pytest.approx(expected_metrics(rows), rel=1e-9)
    assert logged(trainer, "eval_nll") == pytest.approx([expected_metrics(ROWS)["nll"]] * 9)


@pytest.mark.parametrize("kind", ["rows", "datasets", "stream", "dict"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_figures_of_an_evaluation_do_not_depend_on_its_batches(
    tmp_path: Path, kind: str, batch_size: int
) -> None:
    made: dict[str, Any] = {
        "rows": ROWS,
        "datasets": Dataset.from_list(ROWS),
        "stream": Stream(ROWS),
        "dict": {"short": ROWS[:4], "long": Dataset.from_list(ROWS[4:])},
    }
    args = arguments(tmp_path, per_device_eval_batch_size=batch_size)
    # Without data to train on.
    trainer = make_trainer(args, eval_dataset=made[kind])
    returned = trainer.evaluate()
    # Again, so that the first does not count in the second.
    again = trainer.evaluate()
    parts = {"eval_": ROWS}
    if kind == "dict":
        parts = {"eval_short_": ROWS[:4], "eval_long_": ROWS[4:]}
    for prefix, rows in parts.items():
        expected = expected_metrics(rows)
        assert set(expected) == set(METRICS)
        for figures in (returned, again, *([] if kind == "dict" else trainer.state.log_history)):
            assert metrics_of(figures, prefix) == pytest.approx(expected, rel=1e-9)
        if batch_size == 8:
            assert returned[f"{prefix}loss"] == pytest.approx(expected["objective_loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["qwen3_moe", "hidden states"])
def test_predictions_are_those_of_transformers_own_trainer(tmp_path: Path, kind: str) -> None:
    """With a mixture's auxiliary loss before the logits, and its router's after them; and hidden states, where asked for."""
    predictions = []
    for trainer_class in (Trainer, GatedTrainer):
        model = tiny_model("qwen3_moe" if kind == "qwen3_moe" else "qwen3").double()
        model.config.output_router_logits = kind == "qwen3_moe"
        model.config.output_hidden_states = kind == "hidden states"
        trainer = make_trainer(arguments(tmp_path), None, model, trainer_class)
        predictions.append(trainer.predict(make_rows(3, shortest=8, longest=8)).predictions)
    own, gated = predictions
    assert len(gated) == len(own) > 1
    torch.testing.assert_close(gated, own)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_an_evaluation_has_its_last_batch_whatever_training_drops(
    tmp_path: Path, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_module._tell_of_last_rows.cache_clear()
    caplog.set_level(logging.WARNING, "deft_plugin")
    args = arguments(tmp_path, per_device_eval_batch_size=batch_size, dataloader_drop_last=True)
    trainer = make_trainer(args, make_rows(9), eval_dataset=ROWS)
    expected = expected_metrics(ROWS)
    assert metrics_of(trainer.evaluate(), "eval_") == pytest.approx(expected, rel=1e-9)
    output = trainer.predict(ROWS)
    assert metrics_of(output.metrics, "test_") == pytest.approx(expected, rel=1e-9)
    told = [record.getMessage() for record in caplog.records if record.name == "deft_plugin"]
    assert [line for line in told if "dataloader_drop_last=True is for training alone" in line]
    # Eight of nine rows, as before.
    trainer.train()
    assert logged(trainer, "loss")
    assert args.dataloader_drop_last


def test_a_stream_trains_and_evaluates(tmp_path: Path) -> None:
    rows = make_rows(8)
    args = arguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    trainer = make_trainer(args, Stream(rows), eval_dataset=Stream(ROWS))
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(
        formula_mean(qwen3(), rows, "deft").item(), rel=1e-6
    )
    assert trainer.evaluate()["eval_nll"] > 0


def test_data_that_gives_no_batch(tmp_path: Path) -> None:
    for options, data in (
        ({"accelerator_config": {"dispatch_batches": False}}, Stream([])),
        ({"dataloader_drop_last": True}, make_rows(3)),
    ):
        trainer = make_trainer(arguments(tmp_path, **options), data)
        with pytest.raises(ValueError, match="train_dataset gives no batch"):
            trainer.train()
    # Where accelerate reads for all ranks, it says so itself.
    with pytest.raises(ValueError, match="does not contain any data"):
        make_trainer(arguments(tmp_path), Stream([])).train()


@pytest.mark.parametrize(
    ("metric", "best"), [("eval_nll", min), ("perplexity", min), ("eval_mean_gate", max)]
)
def test_best_checkpoint_is_chosen_by_a_metric(tmp_path: Path, metric: str, best: Any) -> None:
    args = arguments(
        tmp_path,
        # So large that the last step is not the best.
        learning_rate=1.0,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    )
    trainer = make_trainer(args, make_rows(4), eval_dataset=make_rows(4))
    trainer.train()
    name = f"eval_{metric.removeprefix('eval_')}"
    values = logged(trainer, name)
    assert trainer.state.best_metric == best(values)
    assert best(values) != values[-1]
    assert trainer.evaluate()[name] == pytest.approx(best(values), rel=1e-12)


@pytest.mark.parametrize(
    ("metric", "is_told"),
    [
        ("eval_ndl", True),
        ("held_out_ppl", True),
        ("nll", True),
        ("held_out_nll", False),
        (None, True),
    ],
)
def test_a_metric_that_no_evaluation_has_is_told_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, metric: str | None, is_told: bool
) -> None:
    caplog.set_level(logging.WARNING, "deft_plugin")
    steps = dict.fromkeys(("eval_strategy", "save_strategy"), "steps")
    keys = {**steps, "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    args = arguments(tmp_path, max_steps=1, metric_for_best_model=metric, **keys)
    trainer = make_trainer(args, make_rows(4), eval_dataset={"held_out": make_rows(4)})
    told = [record.getMessage() for record in caplog.records if record.name == "deft_plugin"]
    # None is the loss to transformers, and that of a dict's data sets has other names.
    message = f"metric_for_best_model={metric or 'loss'!r} is no metric of an evaluation, .* each after held_out_"
    assert any(re.match(message, line) for line in told) is is_told
    with pytest.raises(KeyError, match="metric_for_best_model") if is_told else nullcontext():
        trainer.train()


def test_training_stops_early_when_nll_rises(tmp_path: Path) -> None:
    args = arguments(
        tmp_path,
        learning_rate=3.0,
        max_steps=20,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_nll",
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
    )
    trainer = make_trainer(
        args,
        make_rows(4),
        eval_dataset=make_rows(4, seed=5),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    *_, before, last = values = logged(trainer, "eval_nll")
    assert len(values) < 20
    assert min(before, last) >= min(values)
    assert trainer.state.best_metric == min(values)


def test_a_plateau_is_that_of_nll(tmp_path: Path) -> None:
    args = arguments(
        tmp_path,
        max_steps=1,
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_nll",
    )
    trainer = make_trainer(args, make_rows(4), eval_dataset=make_rows(4))
    trainer.train()
    assert trainer.lr_scheduler.mode == "min"
    assert trainer.lr_scheduler.best == logged(trainer, "eval_nll")[0]


def padded(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, V) of the labelled positions and their targets (n,)."""
    logits, targets = label_logits(qwen3(), rows)
    return logits.detach().numpy(), targets.numpy()


@pytest.mark.parametrize("loss_only", [False, True])
def test_compute_metrics_gets_the_logits(tmp_path: Path, loss_only: bool) -> None:
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"own": 1.5}

    args = arguments(tmp_path, prediction_loss_only=loss_only, include_for_metrics=["loss"])
    trainer = make_trainer(args, eval_dataset=ROWS, compute_metrics=compute_metrics)
    passes: list[None] = []
    trainer.model.model.register_forward_hook(lambda *_: passes.append(None))
    returned = trainer.evaluate()
    assert metrics_of(returned, "eval_") == pytest.approx(expected_metrics(ROWS), rel=1e-9)
    # Two batches, and each again for its logits.
    assert len(passes) == (2 if loss_only else 4)
    if loss_only:
        assert seen == []
        return
    assert returned["eval_own"] == 1.5
    (prediction,) = seen
    scored = prediction.label_ids[:, 1:] != -100
    logits, targets = padded(ROWS)
    np.testing.assert_allclose(prediction.predictions[:, :-1][scored], logits, atol=1e-9)
    np.testing.assert_array_equal(prediction.label_ids[:, 1:][scored], targets)
    assert prediction.losses.mean() == pytest.approx(returned["eval_loss"])


@pytest.mark.parametrize("batch_eval_metrics", [False, True])
def test_logits_are_preprocessed_for_compute_metrics(
    tmp_path: Path, batch_eval_metrics: bool
) -> None:
    hits: list[float] = []

    def share(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        labels = torch.as_tensor(prediction.label_ids)[:, 1:]
        right = torch.as_tensor(prediction.predictions)[:, :-1] == labels
        hits.extend(right[labels != -100].tolist())
        return {"hits": float(np.mean(hits))} if compute_result else {}

    trainer = make_trainer(
        arguments(tmp_path, batch_eval_metrics=batch_eval_metrics),
        eval_dataset=ROWS,
        compute_metrics=share,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    returned = trainer.evaluate()
    assert returned["eval_hits"] == pytest.approx(returned["eval_mean_token_accuracy"], abs=1e-6)


def test_a_prediction_has_logits_labels_and_figures(tmp_path: Path) -> None:
    trainer = make_trainer(arguments(tmp_path))
    output = trainer.predict(ROWS)
    scored = output.label_ids[:, 1:] != -100
    logits, _ = padded(ROWS)
    np.testing.assert_allclose(output.predictions[:, :-1][scored], logits, atol=1e-9)
    assert metrics_of(output.metrics, "test_") == pytest.approx(expected_metrics(ROWS), rel=1e-9)
    # What has no labels has no figures.
    unlabelled = [{"input_ids": row["input_ids"]} for row in ROWS[-1:]]
    output = make_trainer(arguments(tmp_path), data_collator=None).predict(unlabelled)
    own = qwen3()(input_ids=torch.tensor([ROWS[-1]["input_ids"]])).logits.detach().numpy()
    np.testing.assert_allclose(output.predictions, own, atol=1e-9)
    assert not metrics_of(output.metrics, "test_")


def test_steps_called_one_by_one_have_the_same_loss(tmp_path: Path) -> None:
    trainer = make_trainer(arguments(tmp_path), make_rows(4))
    batch = next(iter(trainer.get_train_dataloader()))
    count = batch["labels"][:, 1:].ne(-100).sum()
    loss, logits, labels = trainer.prediction_step(trainer.model, dict(batch), True)
    assert (logits, labels) == (None, None)
    # It is in eval mode from here on.
    torch.testing.assert_close(trainer.training_step(trainer.model, dict(batch), count), loss)
    plain = formula_mean(qwen3(), make_rows(4), "deft")
    torch.testing.assert_close(loss, plain.detach())


def test_evaluation_in_bfloat16_is_near(tmp_path: Path) -> None:
    trainer = make_trainer(arguments(tmp_path, bf16_full_eval=True), eval_dataset=ROWS)
    assert trainer.evaluate()["eval_nll"] == pytest.approx(expected_metrics(ROWS)["nll"], rel=0.02)


def test_histograms_are_written(tmp_path: Path) -> None:
    from deft_plugin.telemetry import read_histograms

    trainer = make_trainer(
        arguments(tmp_path), make_rows(4), eval_dataset=ROWS, loss_kwargs={"histograms": True}
    )
    trainer.train()
    trainer.evaluate()
    entries = read_histograms(tmp_path / "gate_histograms.jsonl")
    assert [entry.split for entry in entries] == ["training", "eval"]
    scored = sum(label != -100 for row in ROWS for label in row["labels"][1:])
    assert sum(entries[1].histograms["gate"].counts) == scored
