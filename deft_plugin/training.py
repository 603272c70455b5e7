"""What a trainer does around a gated head: metrics of every batch, and proof that the head scored it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .head import GatedHead
from .metrics import TokenMetrics
from .ops import GatedLoss


class GatedTraining:
    """A gated head with its metrics over the logging window and over the running evaluation."""

    def __init__(self, head: GatedHead) -> None:
        self.head = head
        self._train = TokenMetrics()
        self._eval = TokenMetrics()

    @contextmanager
    def scoring(self, training: bool) -> Iterator[None]:
        """Take the metrics of the loss that is computed in this context.

        Raises:
            RuntimeError: no gated forward has run in it, so the loss is not the objective's.
        """
        metrics = self._train if training else self._eval
        forwards = 0

        def observe(gated: GatedLoss) -> None:
            nonlocal forwards
            forwards += 1
            metrics.add(gated)

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

    def train_means(self, device: torch.device | str) -> dict[str, float]:
        """Means over the logging window on all ranks, which ends here. Collective."""
        means = self._train.means(device)
        self._train.reset()
        return means

    def start_evaluation(self) -> None:
        """Forget earlier evaluations."""
        self._eval.reset()

    def eval_means(self, device: torch.device | str) -> dict[str, float]:
        """Means over the evaluation on all ranks. Collective."""
        return self._eval.means(device)
