"""What a trainer does around a gated head: metrics of every batch, and proof that the head scored it."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from . import evaluation_rows
from .checks import check_batch, check_modules_to_save, check_tokenizer, check_weights
from .head import GatedHead
from .metrics import TokenMetrics
from .objectives import Objective, build_objective
from .objectives.registry import UnknownParameterError
from .ops import CoreSettings, GatedLoss, split_settings
from .parallelism import check_loader, ranks_of_a_token, splits_sequences
from .step_mean import StepMean
from .telemetry import TRAINING, Telemetry

logger = logging.getLogger("deft_plugin")


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training, beside those of the loss's computation.

    Args:
        histograms: whether to write histograms beside the means (see `telemetry`).

    Raises:
        ValueError: a value of another type.
    """

    histograms: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.histograms, bool):
            raise ValueError(f"histograms is {self.histograms!r}; it must be true or false.")


def parse_parameters(parameters: Any) -> dict[str, Any]:
    """`loss_kwargs` as a dict, from one or from JSON text of one; {} for None.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(parameters, str):
        try:
            parameters = json.loads(parameters)
        except json.JSONDecodeError as error:
            raise ValueError(f"loss_kwargs={parameters!r} is not JSON: {error}.") from None
    if parameters is not None and not isinstance(parameters, dict):
        raise ValueError(f"loss_kwargs={parameters!r} must be a dict or JSON text of one.")
    return parameters or {}


def split_parameters(
    parameters: Mapping[str, Any],
) -> tuple[CoreSettings, TrainingSettings, dict[str, Any]]:
    """What trainers take under one heading: the core's settings, the training's, and the objective's parameters."""
    core, rest = split_settings(parameters)
    names = {field.name for field in dataclasses.fields(TrainingSettings)} & rest.keys()
    return core, TrainingSettings(**{name: rest.pop(name) for name in names}), rest


def build_for_trainer(
    spec: str | Objective,
    parameters: Mapping[str, Any],
    heading: str = "loss_kwargs",
    others: Sequence[str] = (),
) -> Objective:
    """The objective of a training; an unknown parameter's error also names the settings that may stand beside it.

    Args:
        spec: the objective, or its name.
        parameters: its own alone.
        heading: under which trainers take them and settings.
        others: what else may stand there.

    Raises:
        ValueError: as `build_objective`.
    """
    try:
        return build_objective(spec, parameters)
    except UnknownParameterError as error:
        settings = (
            field.name
            for cls in (CoreSettings, TrainingSettings)
            for field in dataclasses.fields(cls)
        )
        raise ValueError(
            f"{error} For every objective {heading} also takes: {', '.join((*settings, *others))}."
        ) from None


class GatedTraining(TrainerCallback):
    """A gated head with its metrics over the logging window and over the running evaluation.

    A callback, since a training may begin more than once: `auto_find_batch_size` tries again with smaller batches.

    Attributes:
        head: the gated head.
        step_mean: what gives the objective its mean over the optimizer step; None where it needs none.

    Raises:
        ValueError: a weight of the model is NaN; an adapter is to train modules that it does not have, or its tokenizer
            pads with a token that it does not have.
    """

    def __init__(
        self, trainer: Any, head: GatedHead, settings: TrainingSettings | None = None
    ) -> None:
        settings = settings or TrainingSettings()
        self.head = head
        self._writes_log = trainer.is_world_process_zero()
        if self._writes_log:
            # FSDP loads the weights on the first rank alone; the others may hold anything.
            check_weights(trainer.model)
        check_modules_to_save(trainer.model)
        check_tokenizer(getattr(trainer, "processing_class", None), head.model)
        self.step_mean = StepMean(head) if head.objective.step_scope else None
        if self.step_mean is not None:
            trainer.add_callback(self.step_mean)
        self._train = TokenMetrics(settings.histograms)
        self._eval = TokenMetrics(settings.histograms)
        # Some trainers leave sequences whole in evaluations: TRL's, and Axolotl's where nothing is trained.
        self._eval_is_of_parts = False
        writes_histograms = settings.histograms and self._writes_log
        self._telemetry = Telemetry(trainer) if writes_histograms else None
        # The data sets whose next batch is the first.
        self._at_beginning = {"train_dataset", "eval_dataset"}
        trainer.add_callback(self)

    def retire(self, trainer: Any) -> None:
        """Leave the trainer, whose model is made anew."""
        for callback in (self, self.step_mean):
            if callback is not None:
                trainer.remove_callback(callback)

    @contextmanager
    def scoring(
        self,
        training: bool,
        rows: int | None = None,
        length: int = 0,
        batch: Mapping[str, Any] | None = None,
    ) -> Iterator[None]:
        """Take the metrics of the loss that is computed in this context.

        Args:
            training: whether they belong to the logging window or to the running evaluation.
            rows: how many of the batch's rows to count, by default all.
            length: of an evaluation's sequences, before the trainer may cut them into parts.
            batch: what the model is given, to look at the first one of a training and of an evaluation.

        Raises:
            ValueError: the first batch has ids outside the model's vocabulary.
            RuntimeError: no gated forward has run in it, so the loss is not the objective's.
        """
        metrics = self._train if training else self._eval
        data = "train_dataset" if training else "eval_dataset"
        if batch is not None and data in self._at_beginning:
            check_batch(data, batch, self.head.model)
            self._at_beginning.remove(data)
        forwards = 0

        def observe(gated: GatedLoss) -> None:
            nonlocal forwards
            forwards += 1
            metrics.add(gated, rows)
            if not training and gated.mask.size(1) < length - 1:
                self._eval_is_of_parts = True
            if training and self.step_mean is not None:
                self.step_mean.observe(gated)

        with self.head.observed_by(observe):
            yield
        if not forwards:
            raise RuntimeError(
                f"The loss of this batch was not computed by the gated head ({self.head.objective!r}): the "
                "batch has no labels, or something has replaced the model's forward or the trainer's loss."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the unlogged rest of an earlier, failed or interrupted training, and what it logged after a checkpoint."""
        self._train.reset()
        self._at_beginning.add("train_dataset")
        if self._telemetry is not None:
            self._telemetry.begin_training(state.global_step)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Give the reporters the histograms, after the means, which came to them as callbacks before this one."""
        if self._telemetry is not None:
            self._telemetry.report()

    # A prediction is not logged.
    on_predict = on_log

    def start_step(self, trainer: Any, batches: Sequence[Any]) -> None:
        """Prepare the objective for the optimizer step made of these micro-batches. Collective.

        Raises:
            ValueError: the first step has none.
        """
        check_loader(trainer)
        if not batches and not trainer.state.global_step and "train_dataset" in self._at_beginning:
            raise ValueError(
                "train_dataset gives no batch: it has no rows, or with dataloader_drop_last=True fewer than a batch."
            )
        if self.step_mean is not None and batches:
            self.step_mean.begin_step(trainer, batches)

    def add_means(self, trainer: Any, logs: dict[str, float]) -> None:
        """Add the means over the logging window on all ranks, which ends here, to a training's log. Collective.

        Args:
            trainer: whose log it is.
            logs: as `Trainer.log` is given them. Trainer's own are those of steps, which have a loss, and the one
                at a training's end, which gets what came after the last of them. Every rank writes these.
        """
        if "loss" in logs or "train_runtime" in logs:
            of_parts = splits_sequences(trainer)
            when = "Since the last log"
            logs.update(self._means_of(self._train, trainer, of_parts, when, TRAINING))
            self._train.reset()

    @contextmanager
    def evaluating(self, loader: Any) -> Iterator[None]:
        """Take the metrics of the evaluation that runs in this context, over the batches of `loader`."""
        self._eval.reset()
        self._eval_is_of_parts = False
        self._at_beginning.add("eval_dataset")
        with evaluation_rows.countable(loader):
            yield

    def eval_means(self, trainer: Any, prefix: str) -> dict[str, float]:
        """Means over the evaluation on all ranks, whose metrics have this prefix. Collective."""
        of_parts = self._eval_is_of_parts
        return self._means_of(self._eval, trainer, of_parts, "In this evaluation", prefix)

    def _means_of(
        self, metrics: TokenMetrics, trainer: Any, of_parts: bool, when: str, split: str
    ) -> dict[str, float]:
        """The means of a window, whose histograms are written, and of whose troubles is told."""
        copies = ranks_of_a_token(trainer, of_parts)
        means = metrics.means(trainer.args.device, of_parts=of_parts, copies=copies)
        if self._telemetry is not None:
            self._telemetry.write(split, metrics.histograms)
        if self._writes_log:
            for trouble in metrics.troubles:
                logger.warning("%s, %s.", when, trouble)
        return means


def own_rows(trainer: Any, labels: Tensor) -> int:
    """How many of the first rows of an evaluation's batch are not there only to fill up the ranks' last batches."""
    rows = evaluation_rows.own_rows(
        trainer.accelerator.gradient_state.active_dataloader, labels.size(0)
    )
    if rows is None:
        _warn_of_fillers()
        return labels.size(0)
    return rows


@functools.cache
def _warn_of_fillers() -> None:
    logger.warning(
        "The ranks' last batches of this evaluation may be filled up with rows of its beginning, and which they are "
        "cannot be known: they count twice in its metrics. Exact are evaluations without packing or padding_free, "
        "and without workers for a stream, or on one rank."
    )
