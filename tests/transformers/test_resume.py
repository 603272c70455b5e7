"""A run goes on from its last checkpoint and ends where it would have ended, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tests.transformers.running import arguments, make_trainer
from tests.updates import StopAtStep, Update, make_rows, update_of


def run(output_dir: Path, **others: Any) -> Any:
    args = arguments(
        output_dir,
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
    )
    return make_trainer(args, make_rows(24), **others)


@pytest.mark.parametrize(
    ("loss", "tied"),
    [
        ({"loss_type": "deft"}, False),
        # Whose checkpoints have no lm_head.
        ({"loss_type": "deft"}, True),
        ({"loss_type": "cayley_trans"}, False),
    ],
    ids=str,
)
def test_an_interrupted_run_resumes_to_the_same_parameters(
    tmp_path: Path, loss: dict[str, Any], tied: bool
) -> None:
    def a_run(folder: Path, **others: Any) -> Any:
        model = tiny_model("qwen3", tie_word_embeddings=tied)
        return run(folder, model=model, **loss, **others)

    whole = a_run(tmp_path / "whole")
    expected = update_of(whole.model, whole.train)

    stopped = a_run(tmp_path / "stopped", callbacks=[StopAtStep(3)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()

    resumed = a_run(tmp_path / "stopped")
    actual: Update = update_of(resumed.model, lambda: resumed.train(resume_from_checkpoint=True))
    assert resumed.state.global_step == 5
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    logs = [
        [entry["nll"] for entry in trainer.state.log_history if "nll" in entry]
        for trainer in (whole, resumed)
    ]
    assert logs[0] == logs[1]
    # What is saved is the model in its own class.
    assert (tmp_path / "stopped" / "checkpoint-4" / "config.json").read_text().count("Gated") == 0
