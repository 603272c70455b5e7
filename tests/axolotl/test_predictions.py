"""What asks the trainer for predictions, as Axolotl's table of them does, gets the model's own logits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import axolotl.utils.callbacks
import pytest
import torch
from axolotl.utils.callbacks import log_prediction_callback_factory
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_tokenizer
from tests.updates import make_rows

from .running import PLUGIN, configuration, make_trainer

EVAL = {"test_datasets": [{"path": "rows.jsonl", "type": "chat_template", "split": "train"}]}


def trainer_of(base_model: Path, tmp_path: Path, plugins: list[str] | None) -> Any:
    values = configuration(base_model, tmp_path, plugins=plugins, eval_batch_size=2, **EVAL)
    return make_trainer(values, make_rows(4), make_rows(4, seed=9))


def test_a_prediction_is_the_loss_the_logits_and_the_labels(
    base_model: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(base_model, tmp_path, [PLUGIN])
    batch = next(iter(trainer.get_eval_dataloader()))
    model = AutoModelForCausalLM.from_pretrained(base_model).eval()
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        expected = model(**unlabelled).logits
    trainer.model.eval()
    loss, logits, labels = trainer.prediction_step(trainer.model, dict(batch), False)
    torch.testing.assert_close(logits, expected)
    assert torch.equal(labels, batch["labels"])
    only_loss = trainer.prediction_step(trainer.model, dict(batch), True)
    assert only_loss[1:] == (None, None)
    torch.testing.assert_close(loss, only_loss[0])
    without_labels = trainer.prediction_step(trainer.model, dict(unlabelled), False)
    torch.testing.assert_close(without_labels[1], expected)


@pytest.mark.parametrize("logger", ["wandb"])
def test_the_table_of_predictions_is_that_without_the_plugin(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: str
) -> None:
    def table(plugins: list[str] | None) -> Any:
        trainer = trainer_of(base_model, tmp_path, plugins)
        # For the generated column, which pads on the left.
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = "left"
        logged: list[Any] = []
        run = SimpleNamespace(log=lambda values: logged.extend(values.values()))
        monkeypatch.setattr(axolotl.utils.callbacks.wandb, "run", run)
        callback = log_prediction_callback_factory(trainer, tokenizer, logger)
        cfg = SimpleNamespace(eval_table_size=4, eval_max_new_tokens=4, device="cpu")
        loaders = {"train_dataloader": None, "eval_dataloader": trainer.get_eval_dataloader()}
        callback(cfg).on_evaluate(trainer.args, trainer.state, trainer.control, **loaders)
        (frame,) = logged
        return frame

    with_plugin, without = table([PLUGIN]), table(None)
    assert len(without) == 4
    assert with_plugin.equals(without)
