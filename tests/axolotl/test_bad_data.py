"""Data that cannot teach: an error before the first step, or a warning with a count."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.updates import Rows, make_rows

from .running import configuration, make_trainer


def test_ids_outside_the_vocabulary_stop_the_run(base_model: Path, tmp_path: Path) -> None:
    rows = make_rows(4)
    rows[2]["input_ids"][-1] = 10**6
    with pytest.raises(
        ValueError, match=r"train_dataset: 1 of 4 rows have input_ids.*row 2: 1,000,000"
    ):
        make_trainer(configuration(base_model, tmp_path), rows)


def without_labels(row: int) -> Rows:
    rows = make_rows(4)
    rows[row]["labels"] = [-100] * len(rows[row]["labels"])
    return rows


def test_rows_without_labels_are_counted(
    base_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "deft_plugin")
    make_trainer(configuration(base_model, tmp_path), without_labels(1), without_labels(3))
    assert [r.getMessage() for r in caplog.records if r.name == "deft_plugin"] == [
        f"{name}: 1 of 4 rows have no token to train on."
        for name in ("train_dataset", "eval_dataset")
    ]


def test_that_rows_may_have_been_too_long_is_said(base_model: Path, tmp_path: Path) -> None:
    """Axolotl leaves rows above sequence_len out, or cuts them, before a trainer has them."""
    values = configuration(base_model, tmp_path)
    trainer = make_trainer(values, make_rows(4))
    trainer.train_dataset = trainer.train_dataset.select([])
    with pytest.raises(ValueError, match=r"has no rows\. Were all longer than sequence_len\?"):
        trainer.check_data_sets()
    cut = [{**row, "labels": [-100] * len(row["labels"])} for row in make_rows(4)]
    with pytest.raises(ValueError, match=r"none of its 4 rows .* of each row and sequence_len"):
        make_trainer(values, cut)
