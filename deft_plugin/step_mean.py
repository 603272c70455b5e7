"""The mean probability of the targets over a whole optimizer step, for objectives that need it beforehand.

A step is several micro-batches on several ranks, and a gate must be known in each backward pass. Scope "global"
looks ahead: a forward pass without gradients over the step's micro-batches, with the random numbers that
training will draw again. Scope "ema" takes a running mean over the steps before, and looks ahead once, at the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from .head import GatedHead
from .objectives import build_objective
from .ops import GatedLoss
from .parallelism import parts_of

DEFAULT_DECAY = 0.9
# Not the callback's name: transformers would make an object of that class anew.
CHECKPOINT_KEY = "deft_plugin"


class StepMean(TrainerCallback):
    """Sets the objective of a gated head for each optimizer step. A callback, which keeps its mean in checkpoints.

    An evaluation uses the mean of the last training step, or the running mean; before the first step, the
    mean of each of its own micro-batches.

    Attributes:
        mean: what the next evaluation (and, for "ema", the next step) uses; None before the first step.
    """

    def __init__(self, head: GatedHead) -> None:
        self.head = head
        # An objective with a step scope has these two parameters as well.
        self.objective: Any = head.objective
        self.reset()

    def reset(self) -> None:
        """Forget earlier steps."""
        self.mean: float | None = self.objective.mean_probability
        self._sums: Tensor | None = None
        self.head.objective = self.objective.at_mean(self.mean)

    def begin_step(self, trainer: Any, batches: Sequence[Any]) -> None:
        """Set the objective for the step made of `batches` on this rank. Collective."""
        self._sums = None
        if self.objective.step_scope == "ema":
            mean = self._look_ahead(trainer, batches) if self.mean is None else self.mean
        elif len(batches) == 1 and trainer.args.world_size == 1:
            mean = None  # The step is one micro-batch, whose own mean it is.
        else:
            mean = self._look_ahead(trainer, batches)
        self.head.objective = self.objective.at_mean(mean)

    def observe(self, gated: GatedLoss) -> None:
        """Count the tokens of one forward pass of the step."""
        sums = _sums_of(gated)
        self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget an earlier training, or an attempt with too large a batch; take up where a checkpoint left off."""
        self.reset()
        mean = state.stateful_callbacks.get(CHECKPOINT_KEY, {}).get("mean")
        if mean is not None:
            self.mean = mean
            self.head.objective = self.objective.at_mean(mean)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bring the mean up to date with the step's tokens on all ranks. Collective."""
        sums = torch.zeros(2) if self._sums is None else self._sums
        step = _mean(sums, args.device)
        if step is None:
            return
        if self.objective.step_scope == "ema" and self.mean is not None:
            decay = DEFAULT_DECAY if self.objective.decay is None else self.objective.decay
            self.mean = decay * self.mean + (1 - decay) * step
        else:
            self.mean = step
        self.head.objective = self.objective.at_mean(self.mean)
        state.stateful_callbacks[CHECKPOINT_KEY] = {"mean": self.mean}

    def _look_ahead(self, trainer: Any, batches: Sequence[Any]) -> float | None:
        """The mean of p over the step, by forward passes that training repeats."""
        totals: list[Tensor] = []
        device = trainer.args.device
        model = trainer.model_wrapped
        model.train()
        head, objective, with_entropy = self.head, self.head.objective, self.head.with_entropy
        head.objective, head.with_entropy = build_objective("nll"), False
        accelerators = [device] if device.type not in ("cpu", "mps") else []
        try:
            with (
                torch.no_grad(),
                torch.random.fork_rng(accelerators, device_type=device.type),
                trainer.compute_loss_context_manager(),
                head.observed_by(lambda gated: totals.append(_sums_of(gated))),
            ):
                for batch in batches:
                    context, inputs = parts_of(trainer, model, batch)
                    with context:
                        model(**trainer._prepare_inputs(inputs))
        finally:
            head.objective, head.with_entropy = objective, with_entropy
        return _mean(sum(totals, torch.zeros(2)), device)


def _sums_of(gated: GatedLoss) -> Tensor:
    """Sum of p and number of tokens, (2,)."""
    dtype = torch.float32 if gated.log_p.device.type == "mps" else torch.float64
    return torch.stack(((gated.log_p.exp() * gated.mask).sum(dtype=dtype), gated.mask.sum()))


def _mean(sums: Tensor, device: torch.device) -> float | None:
    """Mean over all ranks; None without any token, or where a NaN is among them, which the loss shows."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = sums.to(device, dtype)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    total, count = sums.tolist()
    return total / count if count and math.isfinite(total) else None
