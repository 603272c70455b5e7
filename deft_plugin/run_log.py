"""A run's log, whole and with the name of its objective, in the run's folder: what `deft plot` and `deft report` read.

Trainers alone leave it in checkpoints, which are saved before the last step is evaluated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from .objectives import Objective


class RunLog(TrainerCallback, ExportableState):
    """Keeps trainer_state.json in the run's folder from a training's beginning to its end, with the objective in it.

    Args:
        loss_type: the objective's name, or that of the trainer's own loss.
        loss_kwargs: the objective's parameters that are not as usual.
    """

    def __init__(self, loss_type: str, loss_kwargs: Mapping[str, Any] | None = None) -> None:
        self.loss_type = loss_type
        self.loss_kwargs = dict(loss_kwargs or {})

    def state(self) -> dict[str, Any]:
        """What trainer_state.json has of it, among `stateful_callbacks`."""
        arguments = {"loss_type": self.loss_type, "loss_kwargs": self.loss_kwargs}
        return {"args": arguments, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the objective into the log, also where a run that has not named it goes on, and an old log out of the way."""
        state.stateful_callbacks[type(self).__name__] = self.state()
        self._write(args, state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(args, state)

    @staticmethod
    def _write(args: TrainingArguments, state: TrainerState) -> None:
        if args.should_save:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            state.save_to_json(str(folder / TRAINER_STATE_NAME))


def keep_log(
    trainer: Trainer, loss_type: str, loss_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Let a trainer keep its run's log, under this objective from now on."""
    trainer.remove_callback(RunLog)
    trainer.add_callback(RunLog(loss_type, loss_kwargs))


def unusual_parameters(objective: Objective) -> dict[str, Any]:
    """An objective's parameters that differ from their defaults."""
    return {
        field.name: value
        for field in dataclasses.fields(objective)
        if (value := getattr(objective, field.name)) != field.default
    }
