"""A run's log is whole, names its objective, and lies in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trl
from transformers import TrainerCallback

import deft_plugin
from deft_plugin.report.runs import load_run
from deft_plugin.run_log import RunLog
from deft_plugin.trl import SFTTrainer
from tests.transformers import running as transformers_running
from tests.trl.running import as_dataset, config, make_trainer
from tests.updates import StopAtStep, make_rows


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


def test_a_run_that_begins_anew_leaves_no_old_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a_trainer(tmp_path, loss_type="deft").train()
    trainer = a_trainer(tmp_path, loss_type="nll", callbacks=[StopAtStep(2)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    run = load_run(str(tmp_path))
    assert (run.objective, run.steps) == ("nll", 1)
    # Of what the other checkpoints are.
    (told,) = (text for text in caplog.messages if "checkpoints" in text)
    assert told.startswith(
        f"The checkpoints in {tmp_path} are of deft, and this run trains with nll."
    )


DEFT = {"loss_type": "deft", "loss_kwargs": {}}


@pytest.mark.parametrize(
    ("written", "own", "others", "told"),
    [
        (DEFT, ("deft", {}), {}, None),
        (DEFT, ("alpha", {"a": 0.25}), {}, "in {out} are of deft, and this run trains with alpha (a=0.25)."),
        ({"loss_type": "alpha", "loss_kwargs": {"a": 1}}, ("alpha", {}), {}, "are of alpha (a=1), and this run trains with alpha."),
        # With an address that another process has given it.
        pytest.param(
            {"loss_type": "f", "loss_kwargs": {"of": "<built-in method exp of type object>"}},
            ("f", {"of": torch.exp}),
            {},
            None,
            id="a function",
        ),
        (DEFT, (None, {}), {}, "are of deft, and this run trains with a loss without a name."),
        # Another rank; nothing to mix with; a folder elsewhere, to go on from.
        (DEFT, ("nll", {}), {"rank": 1}, None),
        (DEFT, ("nll", {}), {"checkpoints": False}, None),
        (DEFT, ("nll", {}), {"elsewhere": True}, "in {out} are of deft, and this run trains with nll."),
        (DEFT, ("deft", {}), {"elsewhere": True}, None),
        # None that this package has written.
        ([], ("nll", {}), {}, None),
        ({"loss_type": "deft"}, ("nll", {}), {}, None),
    ],
    ids=str,
)  # fmt: skip
def test_checkpoints_of_another_objective_are_named(
    written: Any,
    own: tuple[str | None, dict[str, Any]],
    others: dict[str, Any],
    told: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    (out / "checkpoint-1").mkdir(parents=True)
    if not others.get("checkpoints", True):
        (out / "checkpoint-1").rmdir()
    (out / "objective.json").write_text(json.dumps(written))
    elsewhere = others.get("elsewhere", False)
    args = SimpleNamespace(
        output_dir=str(tmp_path / "new" if elsewhere else out),
        resume_from_checkpoint=str(out / "checkpoint-1") if elsewhere else None,
        should_save=False,
    )
    state = SimpleNamespace(is_world_process_zero=not others.get("rank"))
    RunLog(*own).on_train_begin(args, state, None)
    assert len(caplog.messages) == (told is not None)
    assert (told or "").format(out=out) in caplog.text


def test_parameters_that_json_cannot_have_stop_no_training(tmp_path: Path) -> None:
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None, should_save=False)
    state = SimpleNamespace(is_world_process_zero=True)
    RunLog("own", {"of": {(1, 2): 3}}).on_train_begin(args, state, None)


def test_a_checkpoint_without_it_goes_on(tmp_path: Path) -> None:
    """One of TRL's own trainers, as it was before this package."""
    a_trainer(tmp_path, loss_type="deft").train()
    (tmp_path / "objective.json").unlink()
    (tmp_path / "trainer_state.json").unlink()
    a_trainer(
        tmp_path,
        loss_type="alpha",
        loss_kwargs={"a": 0},
        restore_callback_states_from_checkpoint=True,
    ).train(str(tmp_path / "checkpoint-1"))
    run = load_run(str(tmp_path))
    assert (run.objective, run.steps) == ("alpha (a=0)", 2)


def test_a_plain_trainer_that_goes_on_in_the_folder_is_not_called_by_the_objective(
    tmp_path: Path,
) -> None:
    a_trainer(tmp_path, loss_type="deft").train()
    settings = {"loss_type": "nll", "num_train_epochs": 2, "max_steps": -1}
    saving = {"save_strategy": "steps", "save_steps": 1}
    plain = make_trainer(
        config(tmp_path, trl.SFTConfig, **settings, **saving),
        make_rows(8),
        trainer_class=trl.SFTTrainer,
    )
    plain.train(resume_from_checkpoint=True)
    run = load_run(str(tmp_path))
    assert (run.objective, run.steps, run.path.parent.name) == (None, 4, "checkpoint-4")


def test_an_evaluation_after_training_belongs_to_the_run_and_one_without_does_not(
    tmp_path: Path,
) -> None:
    trainer = a_trainer(tmp_path, loss_type="deft", eval_strategy="no")
    trainer.train()
    assert not load_run(str(tmp_path)).held_out("nll")
    trainer.evaluate()
    assert list(load_run(str(tmp_path)).held_out("nll")) == [2]
    a_trainer(tmp_path, loss_type="nll").evaluate()
    assert list(load_run(str(tmp_path)).held_out("nll")) == [2]


class LogsNumpy(TrainerCallback):
    """Puts what JSON has no form for into the log."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history[-1]["mine"] = np.float32(1)


@pytest.mark.parametrize("loss_type", ["deft", "nll"])
def test_a_log_that_cannot_be_kept_stops_nothing(
    tmp_path: Path, loss_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = a_trainer(tmp_path, loss_type=loss_type, save_strategy="no", callbacks=[LogsNumpy()])
    trainer.train()
    assert trainer.state.global_step == 2
    told = [r.getMessage() for r in caplog.records if "log cannot be kept" in r.getMessage()]
    assert len(told) == 1
    assert "float32" in told[0]


def test_a_folder_in_the_logs_place_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").mkdir()
    a_trainer(tmp_path, loss_type="deft", save_strategy="no").train()


class Mine(SFTTrainer):
    """Another loss, of logits."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(input_ids=inputs["input_ids"]).logits.square().mean()


def seven(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return outputs.logits.float().mean() * 0 + 7


@pytest.mark.parametrize(
    "arguments",
    [
        {"trainer_class": Mine},
        {"compute_loss_func": seven},
        {"label_smoothing_factor": 0.5},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_a_loss_of_ones_own_is_not_called_nll(tmp_path: Path, arguments: dict[str, Any]) -> None:
    smoothing = {
        name: arguments.pop(name) for name in ("label_smoothing_factor",) if name in arguments
    }
    make_trainer(config(tmp_path, loss_type="nll", **smoothing), make_rows(8), **arguments).train()
    assert load_run(str(tmp_path)).objective is None


def test_parameters_of_any_kind_are_kept_as_text(tmp_path: Path, own_objectives: None) -> None:
    @deft_plugin.objective("with_function")
    def loss(log_p: Any, statistics: Any, *, function: Any = None, weights: Any = None) -> Any:
        return -log_p

    settings = {"function": torch.exp, "weights": np.ones(2)}
    make_trainer(
        config(tmp_path, loss_type="with_function", loss_kwargs=settings), make_rows(8)
    ).train()
    assert "built-in" in (load_run(str(tmp_path)).objective or "")
