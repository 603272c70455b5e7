"""A run that is killed goes on from its last checkpoint and ends where it would have ended, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.trl.running import config, make_trainer
from tests.updates import Rows, make_rows, update_of

RUNS: list[dict[str, Any]] = [
    {"loss_type": "deft"},
    {"loss_type": "deft", "packing": True, "max_length": 24, "gradient_accumulation_steps": 2},
    {
        "loss_type": "cayley_trans",
        "loss_kwargs": {"scope": "ema"},
        "gradient_accumulation_steps": 2,
    },
]


class KillAtStep(TrainerCallback):
    """Ends the process as a power cut would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def a_run(output_dir: Path, options: dict[str, Any], **arguments: Any) -> Any:
    rows: Rows = make_rows(24)
    args = config(
        output_dir,
        max_steps=5,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        **options,
    )
    return make_trainer(args, rows, **arguments)


def _train_and_die(_: int, output_dir: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    a_run(output_dir, options, callbacks=[KillAtStep(3)]).train()


@pytest.mark.slow
@pytest.mark.parametrize("options", RUNS, ids=str)
def test_a_killed_run_resumes_to_the_same_parameters(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = a_run(tmp_path / "whole", options)
    expected = update_of(whole.model, whole.train)

    killed = tmp_path / "killed"
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as death:
        # Forked, since a new process would import everything again.
        torch.multiprocessing.start_processes(
            _train_and_die, (killed, options), start_method="fork"
        )
    assert death.value.exit_code == -signal.SIGKILL
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-2"]

    resumed = a_run(killed, options)
    actual = update_of(resumed.model, lambda: resumed.train(resume_from_checkpoint=True))
    assert resumed.state.global_step == 5
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
