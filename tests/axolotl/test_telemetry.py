"""`deft: {histograms: true}`: what a run of Axolotl's writes of the tokens it trains and evaluates on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from deft_plugin.telemetry import FILE_NAME, TRAINING, read_histograms
from tests.formula_metrics import formula_counts
from tests.reporters import assert_sent, use_folder
from tests.updates import Rows, label_logits, make_rows

from .running import configuration, make_trainer

EVAL = {"test_datasets": [{"path": "rows.jsonl", "type": "chat_template", "split": "train"}]}
REPORTERS: dict[str, dict[str, Any]] = {
    "tensorboard": {"use_tensorboard": True},
    "wandb": {"use_wandb": True},
    "trackio": {"use_trackio": True},
}


def expected(base_model: Path, rows: Rows, name: str) -> dict[str, tuple[int, ...]]:
    model = AutoModelForCausalLM.from_pretrained(base_model).double()
    return formula_counts(*label_logits(model, rows), name)


@pytest.mark.parametrize("name", ["deft", "eaft"])
def test_counts_are_numpys_in_training_and_in_evaluations(
    base_model: Path, tmp_path: Path, name: str
) -> None:
    rows, eval_rows = make_rows(8, seed=1), make_rows(5, seed=2)
    values = configuration(
        base_model,
        tmp_path,
        **EVAL,
        deft_objective=name,
        deft={"histograms": True},
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        eval_batch_size=2,
        max_steps=4,
        num_epochs=2,
        logging_steps=2,
        eval_steps=2,
        # So that both passes over the rows have the same values.
        learning_rate=0.0,
    )
    make_trainer(values, rows, eval_rows).train()
    counts = {
        (entry.step, entry.split): {name: h.counts for name, h in entry.histograms.items()}
        for entry in read_histograms(tmp_path / FILE_NAME)
    }
    window, evaluation = expected(base_model, rows, name), expected(base_model, eval_rows, name)
    assert counts == {
        # Before the first step, too.
        **{(step, "eval"): evaluation for step in (0, 2, 4)},
        **{(step, TRAINING): window for step in (2, 4)},
    }
    assert ("focus" in window) == (name == "deft")


@pytest.mark.parametrize("reporter", REPORTERS)
def test_the_runs_own_reporter_gets_them(
    base_model: Path, tmp_path: Path, reporter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_folder(reporter, tmp_path, monkeypatch)
    keys = {**EVAL, **REPORTERS[reporter], "deft": {"histograms": True}}
    values = configuration(base_model, tmp_path, **keys, max_steps=2, eval_steps=1)
    # The YAML, which Axolotl gives to W&B and trackio.
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    path = str(tmp_path / "run.yaml")
    make_trainer(values, make_rows(8), make_rows(4, seed=9), axolotl_config_path=path).train()
    assert_sent(reporter, tmp_path)


def test_off_by_default(base_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(configuration(base_model, tmp_path, **EVAL), make_rows(4), make_rows(2))
    trainer.train()
    trainer.evaluate()
    assert not (tmp_path / FILE_NAME).exists()
