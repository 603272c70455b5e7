"""A run's log is whole, names its objective, and lies in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from deft_plugin.report.runs import load_run
from deft_plugin.trl import SFTTrainer
from tests.transformers import running as transformers_running
from tests.trl.running import as_dataset, config, make_trainer
from tests.updates import make_rows


class Interrupt(TrainerCallback):
    """Ends a training as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def a_trainer(folder: Path, **arguments: Any) -> SFTTrainer:
    """Two steps, a checkpoint at each, and an evaluation after the second one's."""
    callbacks = arguments.pop("callbacks", None)
    settings = {
        "max_steps": -1,
        "num_train_epochs": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "epoch",
        **arguments,
    }
    rows = make_rows(8)
    return make_trainer(
        config(folder, **settings), rows, eval_dataset=as_dataset(rows), callbacks=callbacks
    )


@pytest.mark.parametrize(
    ("arguments", "objective"),
    [
        ({"loss_type": "deft"}, "deft"),
        ({"loss_type": "alpha", "loss_kwargs": {"a": 0.25}}, "alpha (a=0.25)"),
        ({"loss_type": "cayley_trans", "loss_kwargs": {"scope": "ema"}}, "cayley_trans (scope=ema)"),
        ({"loss_type": "nll"}, "nll"),
        ({"loss_type": "dft"}, "dft"),
    ],
    ids=str,
)  # fmt: skip
def test_log_has_the_last_evaluation_and_the_objective(
    tmp_path: Path, arguments: dict[str, Any], objective: str
) -> None:
    a_trainer(tmp_path, **arguments).train()
    run, checkpoint = load_run(str(tmp_path)), load_run(str(tmp_path / "checkpoint-2"))
    assert run.path == tmp_path / "trainer_state.json"
    assert (run.objective, checkpoint.objective) == (objective, objective)
    assert list(run.held_out("mean_token_accuracy")) == [2]
    assert not checkpoint.held_out("mean_token_accuracy")
    assert "train_runtime" in run.history[-1]


def test_transformers_own_trainer_keeps_it_too(tmp_path: Path) -> None:
    args = transformers_running.arguments(tmp_path)
    trainer = transformers_running.make_trainer(
        args, make_rows(8), loss_type="alpha", loss_kwargs={"a": 1}
    )
    trainer.train()
    assert load_run(str(tmp_path)).objective == "alpha (a=1)"


def test_a_run_that_begins_anew_leaves_no_old_log(tmp_path: Path) -> None:
    a_trainer(tmp_path, loss_type="deft").train()
    trainer = a_trainer(tmp_path, loss_type="nll", callbacks=[Interrupt(1)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    run = load_run(str(tmp_path))
    assert (run.objective, run.steps) == ("nll", 1)


def test_a_checkpoint_without_it_goes_on(tmp_path: Path) -> None:
    """One of TRL's own trainers, as it was before this package."""
    a_trainer(tmp_path, loss_type="deft").train()
    path = tmp_path / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RunLog"]
    path.write_text(json.dumps(state))
    a_trainer(tmp_path, loss_type="alpha", loss_kwargs={"a": 0}).train(str(path.parent))
    run = load_run(str(tmp_path))
    assert (run.objective, run.steps) == ("alpha (a=0)", 2)
    assert load_run(str(tmp_path / "checkpoint-2")).objective == "alpha (a=0)"
