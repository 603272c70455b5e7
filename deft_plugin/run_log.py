"""A run's log, whole and with the name of its objective, in the run's folder: what `deft plot` and `deft report` read.

Trainers alone leave it in checkpoints, which are saved before the last step is evaluated. It is there for convenience: whatever
goes wrong with it, training goes on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from .objectives import Objective

logger = logging.getLogger("deft_plugin")

OBJECTIVE_NAME = "objective.json"


class RunLog(TrainerCallback):
    """Keeps trainer_state.json, and objective.json beside it, in the run's folder while a training goes on and after it.

    Args:
        loss_type: the objective's name, or that of the trainer's own loss; None for a loss without a name.
        loss_kwargs: the objective's parameters that are not as usual.
    """

    def __init__(self, loss_type: str | None, loss_kwargs: Mapping[str, Any] | None = None) -> None:
        self.loss_type = loss_type
        self.loss_kwargs = dict(loss_kwargs or {})
        # An evaluation without a training is none of the run whose folder it may be in.
        self._has_begun = False
        self._has_failed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put an earlier run's log out of the way."""
        self._has_begun = True
        if state.is_world_process_zero:
            self._warn_of_another(args)
        self._try(self._write_objective, args)
        self._write(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(args, state)

    on_evaluate = on_save
    on_train_end = on_save

    def _write(self, args: Any, state: Any) -> None:
        if self._has_begun:
            self._try(lambda folder: state.save_to_json(str(folder / TRAINER_STATE_NAME)), args)

    def _write_objective(self, folder: Path) -> None:
        file = folder / OBJECTIVE_NAME
        if self.loss_type is None:
            file.unlink(missing_ok=True)
            return
        file.write_text(self._as_json() + "\n", encoding="utf-8")

    def _as_json(self) -> str:
        objective = {"loss_type": self.loss_type, "loss_kwargs": self.loss_kwargs}
        return json.dumps(objective, default=_as_text)

    def _warn_of_another(self, args: Any) -> None:
        """Name the objective of the checkpoints that this run goes on from, or puts its own beside, where it is another."""
        try:
            own = json.loads(self._as_json())
        except (TypeError, ValueError):
            return  # Of parameters that JSON has no keys for, of which writing tells.
        output, resumed = Path(args.output_dir), args.resume_from_checkpoint
        # `trainer.train(FOLDER)` leaves no trace of a folder elsewhere.
        folders = [Path(resumed).parent] if isinstance(resumed, str) else []
        folders += [output] if any(output.glob("checkpoint-*")) else []
        for folder in dict.fromkeys(folders):
            other = _read_objective(folder / OBJECTIVE_NAME)
            if other not in (None, own):
                logger.warning(
                    "The checkpoints in %s are of %s, and this run trains with %s. If that is not meant, give it the same "
                    "objective, or an output_dir of its own.",
                    folder,
                    _described(other),
                    _described(own),
                )
                return

    def _try(self, write: Callable[[Path], object], args: Any) -> None:
        if not args.should_save:
            return
        folder = Path(args.output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder)
        # A folder that cannot be written to; a figure of somebody's own that JSON has no form for.
        except (OSError, TypeError, ValueError) as error:
            if not self._has_failed:
                logger.warning("The run's log cannot be kept in %s: %s.", folder, error)
            self._has_failed = True


def _as_text(value: object) -> str:
    """Its repr without the address, which another process gives another."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _read_objective(file: Path) -> Any:
    """What an objective.json holds; None where it cannot be read."""
    try:
        objective = json.loads(file.read_text(encoding="utf-8"))
        return objective if isinstance(objective["loss_kwargs"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _described(objective: Mapping[str, Any]) -> str:
    name = objective.get("loss_type") or "a loss without a name"
    parameters = ", ".join(f"{key}={value}" for key, value in objective["loss_kwargs"].items())
    return f"{name} ({parameters})" if parameters else str(name)


def keep_log(
    trainer: Trainer, loss_type: str | None, loss_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Let a trainer keep its run's log, under this objective from now on."""
    trainer.remove_callback(RunLog)
    trainer.add_callback(RunLog(loss_type, loss_kwargs))


def unusual_parameters(objective: Objective) -> dict[str, Any]:
    """An objective's parameters that differ from their defaults."""
    return {
        field.name: value
        for field in dataclasses.fields(objective)
        # Parameters of other people's objectives may be arrays, which are not simply equal.
        if repr(value := getattr(objective, field.name)) != repr(field.default)
    }
