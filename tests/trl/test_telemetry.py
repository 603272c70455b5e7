"""`loss_kwargs={"histograms": True}`: what TRL's trainer writes of the tokens it trains and evaluates on."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from deft_plugin.telemetry import FILE_NAME, TRAINING, read_histograms
from tests.distributed.ranks import run_ranks
from tests.formula_metrics import formula_counts
from tests.reporters import REPORTERS, assert_sent, use_folder
from tests.trl.running import as_dataset, config, make_trainer
from tests.updates import Rows, label_logits, make_rows, qwen3

Counts = dict[tuple[int, str], dict[str, tuple[int, ...]]]


def asked_for(folder: Path, loss_type: str = "deft", **options: Any) -> Any:
    return config(folder, loss_type=loss_type, loss_kwargs={"histograms": True}, **options)


def counts_in(folder: Path) -> Counts:
    """The counts by step and split, each of which the file has once."""
    entries = read_histograms(folder / FILE_NAME)
    assert len(entries) == len((folder / FILE_NAME).read_text().splitlines())
    return {
        (entry.step, entry.split): {name: h.counts for name, h in entry.histograms.items()}
        for entry in entries
    }


def expected_counts(rows: Rows, name: str = "deft") -> dict[str, tuple[int, ...]]:
    return formula_counts(*label_logits(qwen3(), rows), name)


@pytest.mark.parametrize("loss_type", ["deft", "eaft"])
def test_counts_are_numpys_in_training_and_in_evaluations(tmp_path: Path, loss_type: str) -> None:
    rows, eval_rows = make_rows(8, seed=1), make_rows(5, seed=2)
    args = asked_for(
        tmp_path,
        loss_type,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=5,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        # So that every pass over the rows has the same values.
        learning_rate=0.0,
        train_sampling_strategy="sequential",
    )
    trainer = make_trainer(args, rows, eval_dataset=as_dataset(eval_rows))
    trainer.train()
    trainer.predict(trainer.eval_dataset)
    window, evaluation = expected_counts(rows, loss_type), expected_counts(eval_rows, loss_type)
    assert counts_in(tmp_path) == {
        (0, "eval"): evaluation,
        (2, TRAINING): window,
        (2, "eval"): evaluation,
        (4, TRAINING): window,
        (4, "eval"): evaluation,
        (5, "eval"): evaluation,
        # What came after the last log of a step.
        (5, TRAINING): expected_counts(rows[:4], loss_type),
        (5, "test"): evaluation,
    }
    assert ("focus" in window) == (loss_type == "deft")


def test_every_data_set_of_a_dict_has_its_counts(tmp_path: Path) -> None:
    parts = {"one": make_rows(3, seed=1), "other": make_rows(5, seed=2)}
    datasets = {name: as_dataset(rows) for name, rows in parts.items()}
    make_trainer(asked_for(tmp_path), make_rows(2), eval_dataset=datasets).evaluate()
    assert counts_in(tmp_path) == {
        (0, f"eval_{name}"): expected_counts(rows) for name, rows in parts.items()
    }


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_counts_do_not_depend_on_how_a_step_is_split(
    tmp_path: Path, size: int, accumulation: int
) -> None:
    rows = make_rows(8, seed=1)
    args = asked_for(
        tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
    )
    make_trainer(args, rows).train()
    assert counts_in(tmp_path) == {(1, TRAINING): expected_counts(rows)}


def test_two_ranks_write_what_one_process_writes(tmp_path: Path) -> None:
    rows = make_rows(2, seed=1, shortest=3, longest=4) + make_rows(6, seed=2)
    # Not a multiple of what the ranks take at once: one of them repeats rows to fill up its last batch.
    eval_rows = make_rows(5, seed=3)
    options = {
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 2,
        "logging_steps": 2,
    }

    def train(folder: Path, size: int) -> None:
        args = asked_for(folder, per_device_train_batch_size=size, **options)
        make_trainer(args, rows, eval_dataset=as_dataset(eval_rows)).train()

    train(tmp_path / "one", 4)
    run_ranks(lambda rank: train(tmp_path / "two", 2), tmp_path)
    counts = counts_in(tmp_path / "one")
    assert counts_in(tmp_path / "two") == counts
    assert list(counts) == [(1, "eval"), (2, TRAINING), (2, "eval")]
    scored = sum(label != -100 for row in eval_rows for label in row["labels"][1:])
    assert sum(counts[2, "eval"]["gate"]) == scored


class KillAtStep(TrainerCallback):
    """Ends the process as a power cut would, after the step is logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def a_run(folder: Path, **arguments: Any) -> Any:
    args = asked_for(
        folder,
        max_steps=5,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    return make_trainer(args, make_rows(12), eval_dataset=as_dataset(make_rows(3)), **arguments)


def _train_and_die(_: int, folder: Path) -> None:
    torch.set_num_threads(1)
    trainer = a_run(folder)
    # After the package's own.
    trainer.add_callback(KillAtStep(4))
    trainer.train()


@pytest.mark.slow
def test_a_killed_run_that_goes_on_has_the_counts_of_a_whole_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    a_run(whole).train()
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        torch.multiprocessing.start_processes(_train_and_die, (killed,), start_method="fork")
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-2"]
    # Two steps more than the checkpoint.
    assert (4, TRAINING) in counts_in(killed)
    a_run(killed).train(resume_from_checkpoint=True)
    assert counts_in(killed) == counts_in(whole)
    assert len(counts_in(whole)) == 10


def test_off_by_default(tmp_path: Path) -> None:
    rows = make_rows(4)
    for kwargs in (None, {"histograms": False}):
        args = config(tmp_path, loss_kwargs=kwargs)
        trainer = make_trainer(args, rows, eval_dataset=as_dataset(rows))
        trainer.train()
        trainer.evaluate()
    assert not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize("value", ["yes", 1, None, {"gate": True}], ids=str)
def test_another_value_is_refused_when_the_configuration_is_made(
    tmp_path: Path, value: Any
) -> None:
    message = rf"histograms is {re.escape(repr(value))}; it must be true or false"
    with pytest.raises(ValueError, match=message):
        config(tmp_path, loss_kwargs={"histograms": value})


@pytest.mark.parametrize("reporter", REPORTERS)
def test_the_trainers_own_reporter_gets_them(
    tmp_path: Path, reporter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_folder(reporter, tmp_path, monkeypatch)
    args = asked_for(
        tmp_path,
        report_to=[reporter],
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
    )
    rows = make_rows(4)
    make_trainer(args, rows, eval_dataset=as_dataset(rows)).train()
    assert_sent(reporter, tmp_path)


def test_no_reporter_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_trainer(asked_for(tmp_path / "run"), make_rows(4)).train()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {
        FILE_NAME,
        "README.md",
        "objective.json",
        "trainer_state.json",
    }
