"""The trainer's log has the metrics of the window's tokens, in training and in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, TrainerCallback

from deft_plugin.metrics import METRICS
from deft_plugin.trl import SFTTrainer
from tests.formula_metrics import formula_metrics
from tests.trl.running import as_dataset, config, make_trainer
from tests.updates import label_logits, logged, make_rows, qwen3

SHORT, LONG = {"shortest": 3, "longest": 4}, {"shortest": 25, "longest": 30}


def metrics_of(entry: dict[str, float], prefix: str = "") -> dict[str, float]:
    return {name: entry[prefix + name] for name in METRICS if prefix + name in entry}


def expected_metrics(rows: Any) -> dict[str, float]:
    return formula_metrics(*label_logits(qwen3(), rows), "deft")


def test_training_window_is_weighted_by_token_over_micro_batches_and_steps(tmp_path: Path) -> None:
    rows = make_rows(2, seed=1, **SHORT) + make_rows(2, seed=2, **LONG)
    args = config(
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=2,
        # So that every pass over the rows has the same metrics.
        learning_rate=0.0,
    )
    trainer = make_trainer(args, rows)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert metrics_of(entry) == pytest.approx(expected_metrics(rows), rel=1e-9)


def test_unlogged_steps_of_an_interrupted_training_do_not_count_in_the_next(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    rows = make_rows(4, **LONG)
    args = config(tmp_path, logging_steps=2, max_steps=2, learning_rate=0.0)
    trainer = make_trainer(args, rows)
    trainer.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    changed = [{"input_ids": row["input_ids"][::-1], "labels": row["labels"]} for row in rows]
    trainer.train_dataset = as_dataset(changed)
    trainer.train()
    # Two steps on all rows.
    assert metrics_of(trainer.state.log_history[0]) == pytest.approx(
        expected_metrics(2 * changed), rel=1e-9
    )


@pytest.mark.parametrize(("logging_steps", "last"), [(500, 5), (2, 1), (1, 0)])
def test_summary_has_the_metrics_of_the_steps_after_the_last_log(
    tmp_path: Path, logging_steps: int, last: int
) -> None:
    rows = make_rows(5, seed=1)
    args = config(
        tmp_path,
        per_device_train_batch_size=1,
        max_steps=5,
        logging_steps=logging_steps,
        learning_rate=0.0,
        train_sampling_strategy="sequential",
        # Evaluations, and what they leave in the log, come between.
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer = make_trainer(args, rows, eval_dataset=as_dataset(make_rows(3, seed=2)))
    trainer.train()
    summary = trainer.state.log_history[-1]
    assert "train_runtime" in summary
    # As in TRL's own training, under its name for it.
    assert ("mean_token_accuracy" in summary) == (last > 0)
    if last:
        assert metrics_of(summary) == pytest.approx(expected_metrics(rows[-last:]), rel=1e-9)


class OutOfMemory(SFTTrainer):
    """Has memory for two rows at once; more of them fail in an attempt's third step."""

    attempts = steps = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self._train_batch_size > 2:
            self.steps += 1
            if self.steps % 3 == 0:
                self.attempts += 1
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss


@pytest.mark.parametrize("loss_type", ["deft", "cayley_trans"])
def test_window_is_that_of_the_attempt_that_fits_into_memory(
    tmp_path: Path, loss_type: str
) -> None:
    def train(trainer_class: Any, **options: Any) -> tuple[Any, dict[str, float]]:
        args = config(
            tmp_path,
            loss_type=loss_type,
            max_steps=4,
            logging_steps=4,
            learning_rate=0.0,
            train_sampling_strategy="sequential",
            **options,
        )
        trainer = make_trainer(args, make_rows(8, seed=1), trainer_class=trainer_class)
        trainer.train()
        (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        return trainer, entry

    options = {"per_device_train_batch_size": 8, "auto_find_batch_size": True}
    tried, entry = train(OutOfMemory, **options)
    _, expected = train(SFTTrainer, per_device_train_batch_size=2)
    assert tried.attempts > 1
    assert metrics_of(entry) == pytest.approx(metrics_of(expected), rel=1e-12)
    assert entry["loss"] == expected["loss"]


def test_evaluation_is_weighted_by_token(tmp_path: Path) -> None:
    rows = make_rows(4, seed=1, **SHORT) + make_rows(3, seed=2, **LONG)
    trainer = make_trainer(config(tmp_path), make_rows(2), eval_dataset=as_dataset(rows))
    returned = trainer.evaluate()
    # Again, so that the first does not count in the second.
    assert trainer.evaluate()["eval_nll"] == returned["eval_nll"]
    for entry in (returned, trainer.state.log_history[0]):
        assert metrics_of(entry, "eval_") == pytest.approx(expected_metrics(rows), rel=1e-9)


def test_evaluation_in_training_leaves_the_training_s_window_alone(tmp_path: Path) -> None:
    rows, eval_rows = make_rows(4, seed=1), make_rows(3, seed=2)
    args = config(
        tmp_path,
        learning_rate=0.0,
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
    )
    trainer = make_trainer(args, rows, eval_dataset=as_dataset(eval_rows))
    trainer.train()
    assert len(logged(trainer, "eval_nll")) == 5
    for entry in trainer.state.log_history:
        if "loss" in entry:
            # Two steps on all rows.
            assert metrics_of(entry) == pytest.approx(expected_metrics(2 * rows), rel=1e-9)
        if "eval_loss" in entry:
            assert metrics_of(entry, "eval_") == pytest.approx(
                expected_metrics(eval_rows), rel=1e-9
            )


def test_every_data_set_of_a_dict_has_its_metrics(tmp_path: Path) -> None:
    parts = {"one": make_rows(3, seed=1), "other": make_rows(5, seed=2)}
    trainer = make_trainer(
        config(tmp_path),
        make_rows(2),
        eval_dataset={name: as_dataset(rows) for name, rows in parts.items()},
    )
    returned = trainer.evaluate()
    for name, rows in parts.items():
        assert metrics_of(returned, f"eval_{name}_") == pytest.approx(
            expected_metrics(rows), rel=1e-9
        )
    # TRL logs means of micro-batch means, under one prefix for all data sets.
    assert not set(returned) & {"eval_entropy", "eval_mean_token_accuracy"}


def test_prediction_and_other_prefixes_have_their_metrics(tmp_path: Path) -> None:
    rows = make_rows(3, seed=1)
    trainer = make_trainer(config(tmp_path), make_rows(2))
    output = trainer.predict(
        trainer._prepare_dataset(
            as_dataset(rows), trainer.processing_class, trainer.args, False, None, "test"
        )
    )
    assert metrics_of(output.metrics, "test_") == pytest.approx(expected_metrics(rows), rel=1e-9)
    returned = trainer.evaluate(as_dataset(rows), metric_key_prefix="held_out")
    assert metrics_of(returned, "held_out_") == pytest.approx(expected_metrics(rows), rel=1e-9)


@pytest.mark.parametrize(("metric", "best"), [("eval_nll", min), ("eval_mean_gate", max)])
def test_best_checkpoint_is_chosen_by_a_metric(tmp_path: Path, metric: str, best: Any) -> None:
    args = config(
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
    rows = make_rows(4)
    trainer = make_trainer(args, rows, eval_dataset=as_dataset(rows))
    trainer.train()
    values = logged(trainer, metric)
    assert trainer.state.best_metric == best(values)
    assert best(values) != values[-1]
    assert trainer.evaluate()[metric] == pytest.approx(best(values), rel=1e-12)


@pytest.mark.parametrize(
    ("own", "instead"),
    [
        ({"loss_type": "nll"}, {"loss_type": "alpha", "loss_kwargs": {"a": 0}}),
        ({"loss_type": "dft"}, {"loss_type": "p"}),
    ],
    ids=["nll", "dft"],
)
def test_a_metric_that_trls_own_loss_lacks_is_refused_with_a_loss_that_has_it(
    tmp_path: Path, own: dict[str, Any], instead: dict[str, Any]
) -> None:
    steps = dict.fromkeys(("eval_strategy", "save_strategy"), "steps")
    keys = {**steps, "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    rows = make_rows(4)

    def trainer(**loss: Any) -> Any:
        args = config(tmp_path, **keys, **loss)
        return make_trainer(args, rows, eval_dataset=as_dataset(rows))

    with pytest.raises(ValueError, match="metric_for_best_model='eval_nll' comes with") as error:
        trainer(**own, metric_for_best_model="eval_nll")
    assert "Set it to 'eval_loss'" in str(error.value)
    assert all(f"{key}={value!r}" in str(error.value) for key, value in instead.items())
    # TRL has this one too.
    trls = trainer(**own, metric_for_best_model="eval_entropy")
    ours = trainer(**instead, metric_for_best_model="eval_nll")
    for each in (trls, ours):
        each.train()
        assert each.state.best_metric is not None
    if own["loss_type"] == "nll":
        # TRL sums in float32.
        assert logged(ours, "loss") == pytest.approx(logged(trls, "loss"), rel=1e-6)
    states = [dict(each.model.named_parameters()) for each in (trls, ours)]
    for name, parameter in states[0].items():
        torch.testing.assert_close(parameter, states[1][name])


def test_a_metric_of_ones_own_code_with_trls_own_loss_is_not_refused(tmp_path: Path) -> None:
    rows = make_rows(2)
    keys = {"loss_type": "nll", "eval_strategy": "steps", "metric_for_best_model": "eval_nll"}
    make_trainer(
        config(tmp_path, **keys),
        rows,
        eval_dataset=as_dataset(rows),
        compute_metrics=lambda prediction: {"nll": 1.0},
    )


@pytest.mark.parametrize("loss_only", [False, True])
def test_compute_metrics_gets_the_logits(tmp_path: Path, loss_only: bool) -> None:
    rows = make_rows(3, seed=1)
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"own": 1.5}

    passes: list[None] = []
    trainer = make_trainer(
        config(tmp_path, prediction_loss_only=loss_only),
        make_rows(2),
        eval_dataset=as_dataset(rows),
        compute_metrics=compute_metrics,
    )
    trainer.model.model.register_forward_hook(lambda *_: passes.append(None))
    returned = trainer.evaluate()
    assert metrics_of(returned, "eval_") == pytest.approx(expected_metrics(rows), rel=1e-9)
    if loss_only:
        assert seen == []
        assert len(passes) == 1
        return
    assert returned["eval_own"] == 1.5
    labels, logits = seen[0].label_ids, seen[0].predictions
    assert isinstance(labels, np.ndarray)
    assert isinstance(logits, np.ndarray)
    scored = labels[:, 1:] != -100
    expected, targets = label_logits(qwen3(), rows)
    order = np.argsort([len(row["input_ids"]) for row in rows])
    assert len(order) == 3
    np.testing.assert_allclose(logits[:, :-1][scored], expected.detach().numpy(), atol=1e-9)
    np.testing.assert_array_equal(labels[:, 1:][scored], targets.numpy())


def test_logits_are_preprocessed_for_compute_metrics(tmp_path: Path) -> None:
    rows = make_rows(3, seed=1)

    def share(prediction: EvalPrediction) -> dict[str, float]:
        labels = prediction.label_ids[:, 1:]
        hits = (prediction.predictions[:, :-1] == labels)[labels != -100]
        return {"hits": hits.mean().item()}

    trainer = make_trainer(
        config(tmp_path),
        make_rows(2),
        eval_dataset=as_dataset(rows),
        compute_metrics=share,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    returned = trainer.evaluate()
    assert returned["eval_hits"] == pytest.approx(returned["eval_mean_token_accuracy"], abs=1e-6)


def test_callbacks_and_checkpoints_see_the_loss_type_that_was_asked_for(tmp_path: Path) -> None:
    seen = set()

    class Watch(TrainerCallback):
        def on_event(self, args: Any, *_: Any, **kwargs: Any) -> None:
            seen.add(args.loss_type)

        on_train_begin = on_step_begin = on_substep_end = on_pre_optimizer_step = on_event
        on_step_end = on_log = on_evaluate = on_prediction_step = on_save = on_train_end = on_event

    args = config(
        tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1
    )
    rows = make_rows(4)
    trainer = make_trainer(args, rows, eval_dataset=as_dataset(rows), callbacks=[Watch()])
    trainer.train()
    assert seen == {"deft"}
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.loss_type == "deft"
    assert (tmp_path / "README.md").exists()
