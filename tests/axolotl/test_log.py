"""The log has the metrics of the tokens, ppl is exp(nll), and evaluation reports nll."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from deft_plugin.metrics import METRICS
from tests.formula_metrics import formula_metrics
from tests.updates import Rows, label_logits, make_rows

from .running import QLORA, configuration, make_trainer

SHORT, LONG = {"shortest": 6, "longest": 7}, {"shortest": 25, "longest": 30}
EVAL = {"test_datasets": [{"path": "rows.jsonl", "type": "chat_template", "split": "train"}]}


def expected(base_model: Path, rows: Rows) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(base_model)
    return formula_metrics(*label_logits(model, rows), "deft")


def metrics_of(entry: dict[str, float], prefix: str = "") -> dict[str, float]:
    return {name: entry[prefix + name] for name in METRICS if prefix + name in entry}


def test_training_log_is_weighted_by_token_and_ppl_is_exp_nll(
    base_model: Path, tmp_path: Path
) -> None:
    rows = make_rows(2, seed=1, **SHORT) + make_rows(2, seed=2, **LONG)
    values = configuration(
        base_model,
        tmp_path,
        micro_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=4,
        num_epochs=2,
        logging_steps=2,
        # So that both passes over the rows have the same metrics.
        learning_rate=0.0,
    )
    trainer = make_trainer(values, rows)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert metrics_of(entry) == pytest.approx(expected(base_model, rows), rel=1e-4)
        assert entry["ppl"] == pytest.approx(math.exp(entry["nll"]))
        assert entry["ppl"] > 10 * math.exp(entry["loss"])


def test_evaluation_is_weighted_by_token_and_reports_nll(base_model: Path, tmp_path: Path) -> None:
    rows = make_rows(4, seed=1, **SHORT) + make_rows(3, seed=2, **LONG)
    values = configuration(base_model, tmp_path, eval_batch_size=2, **EVAL)
    trainer = make_trainer(values, make_rows(4), rows)
    returned = trainer.evaluate()
    # Again, so that the first does not count in the second.
    assert trainer.evaluate()["eval_nll"] == returned["eval_nll"]
    for entry in (returned, trainer.state.log_history[0]):
        assert metrics_of(entry, "eval_") == pytest.approx(expected(base_model, rows), rel=1e-4)
        assert entry["eval_ppl"] == pytest.approx(math.exp(entry["eval_nll"]))


@pytest.mark.parametrize("adapter", [{}, QLORA], ids=["full", "qlora"])
def test_an_evaluation_does_not_change_the_training_or_its_log(
    base_model: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    rows = make_rows(8)

    def log(**overrides: Any) -> list[dict[str, float]]:
        values = configuration(
            base_model, tmp_path, max_steps=2, learning_rate=0.1, **EVAL, **adapter, **overrides
        )
        trainer = make_trainer(values, rows, make_rows(4, seed=9))
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        return [metrics_of(entry) for entry in steps]

    with_evaluations, without = log(eval_steps=1), log(eval_strategy="no")
    assert len(without) == 2
    assert with_evaluations == without


@pytest.mark.parametrize(
    ("keys", "greater_is_better"),
    [
        ({"metric_for_best_model": "ppl"}, False),
        ({"metric_for_best_model": "eval_nll"}, False),
        ({"metric_for_best_model": "perplexity"}, False),
        ({"metric_for_best_model": "eval_mean_token_accuracy"}, True),
        ({"metric_for_best_model": "eval_entropy", "greater_is_better": False}, False),
        ({"metric_for_best_model": "eval_nll", "greater_is_better": True}, True),
        ({}, False),
    ],
)
def test_the_best_checkpoint_has_the_smallest_nll(
    base_model: Path,
    tmp_path: Path,
    keys: dict[str, Any],
    greater_is_better: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "deft_plugin")
    values = configuration(
        base_model,
        tmp_path,
        **EVAL,
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        **keys,
    )
    trainer = make_trainer(values, make_rows(4), make_rows(2, seed=9))
    assert trainer.args.greater_is_better is greater_is_better
    assert "is no metric of an evaluation" not in caplog.text
