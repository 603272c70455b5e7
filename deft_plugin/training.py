"""What a trainer does around a gated head: metrics of every batch, and proof that the head scored it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .checks import check_tokenizer, check_weights
from .head import GatedHead
from .metrics import TokenMetrics
from .ops import GatedLoss
from .step_mean import StepMean

logger = logging.getLogger("deft_plugin")


class GatedTraining:
    """A gated head with its metrics over the logging window and over the running evaluation.

    Attributes:
        head: the gated head.
        step_mean: what gives the objective its mean over the optimizer step; None where it needs none.

    Raises:
        ValueError: a weight of the model is NaN; its tokenizer pads with a token that it does not have.
    """

    def __init__(self, trainer: Any, head: GatedHead) -> None:
        self.head = head
        self._writes_log = trainer.is_world_process_zero()
        if self._writes_log:
            # FSDP loads the weights on the first rank alone; the others may hold anything.
            check_weights(trainer.model)
        check_tokenizer(getattr(trainer, "processing_class", None), head.model)
        self.step_mean = StepMean(head) if head.objective.step_scope else None
        if self.step_mean is not None:
            trainer.add_callback(self.step_mean)
        self._train = TokenMetrics()
        self._eval = TokenMetrics()

    @contextmanager
    def scoring(self, training: bool, rows: int | None = None) -> Iterator[None]:
        """Take the metrics of the loss that is computed in this context.

        Args:
            training: whether they belong to the logging window or to the running evaluation.
            rows: how many of the batch's rows to count, by default all.

        Raises:
            RuntimeError: no gated forward has run in it, so the loss is not the objective's.
        """
        metrics = self._train if training else self._eval
        forwards = 0

        def observe(gated: GatedLoss) -> None:
            nonlocal forwards
            forwards += 1
            metrics.add(gated, rows)
            if training and self.step_mean is not None:
                self.step_mean.observe(gated)

        with self.head.observed_by(observe):
            yield
        if not forwards:
            raise RuntimeError(
                f"The loss of this batch was not computed by the gated head ({self.head.objective!r}): the "
                "batch has no labels, or something has replaced the model's forward or the trainer's loss."
            )

    def start_training(self) -> None:
        """Forget the unlogged rest of an earlier or interrupted training."""
        self._train.reset()
        if self.step_mean is not None:
            self.step_mean.reset()

    def start_step(self, trainer: Any, batches: Sequence[Any]) -> None:
        """Prepare the objective for the optimizer step made of these micro-batches. Collective."""
        if self.step_mean is not None and batches:
            self.step_mean.begin_step(trainer, batches)

    def train_means(self, device: torch.device | str) -> dict[str, float]:
        """Means over the logging window on all ranks, which ends here. Collective."""
        means = self._train.means(device)
        self._train.reset()
        self._tell(self._train, "Since the last log")
        return means

    def start_evaluation(self) -> None:
        """Forget earlier evaluations."""
        self._eval.reset()

    def eval_means(self, device: torch.device | str) -> dict[str, float]:
        """Means over the evaluation on all ranks. Collective."""
        means = self._eval.means(device)
        self._tell(self._eval, "In this evaluation")
        return means

    def _tell(self, metrics: TokenMetrics, when: str) -> None:
        if self._writes_log:
            for trouble in metrics.troubles:
                logger.warning("%s, %s.", when, trouble)


def own_rows(trainer: Any, labels: Tensor) -> int | None:
    """How many rows of an evaluation's batch are not there only to fill up the ranks' last batches.

    None for all, also where packing has made one row of several.
    """
    state, rows = trainer.accelerator.gradient_state, labels.size(0)
    if not state.end_of_dataloader or state.remainder <= 0 or rows != trainer.args.eval_batch_size:
        return None
    return min(max(state.remainder - trainer.accelerator.process_index * rows, 0), rows)
