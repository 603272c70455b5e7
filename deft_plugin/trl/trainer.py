"""Objectives in TRL's SFTTrainer: what `loss_type="deft"` does, for TRL 1.16 and 1.9.

A training run with an objective is TRL's own run in which

1. conflicts are refused before anything is loaded;
2. TRL is told one of its own loss types, whose code reads the loss off the model's output;
3. the model has a gated head, whose output has the names that this code reads;
4. metrics of every scored token go to the log.

TRL's normalisation, gradient accumulation, logging and evaluation are untouched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer import utils as trl_utils

from ..head import GatedCausalLMOutput, add_gated_head
from ..quantization import keep_cpu_weights_unpacked
from ..training import GatedTraining
from .config import SFTConfig, extend_config_class, objective_of
from .conflicts import check_conflicts

# TRL >= 1.15 scores with a fused head under "nll" and reads log-probabilities off the output. Before, it
# did so under "chunked_nll" and read the loss and sums.
HAS_FUSED_HEAD = hasattr(trl_utils, "add_fused_lm_head")
STAND_IN_LOSS_TYPE = "nll" if HAS_FUSED_HEAD else "chunked_nll"


@dataclass
class TRLOutput(GatedCausalLMOutput):
    """A gated output under the names that TRL's `compute_loss` reads."""

    @property
    def log_probs(self) -> Tensor:
        """Minus the per-token loss: TRL 1.16 sums -log_probs and normalises the sum."""
        return -self._tensor("token_loss")

    @property
    def num_valid_tokens(self) -> Tensor:
        """Number of scored positions (TRL 1.9)."""
        return self._tensor("label_mask").sum()

    @property
    def entropy_sum(self) -> Tensor:
        """Sum of entropies over scored positions (TRL 1.9)."""
        return self._tensor("entropy").sum()

    @property
    def num_correct_tokens(self) -> Tensor:
        """Number of scored positions whose target has the largest logit (TRL 1.9)."""
        return self._tensor("is_top1").sum()

    def _tensor(self, name: str) -> Tensor:
        value = getattr(self, name)
        assert isinstance(value, Tensor)
        return value


def extend_trainer_class(cls: type) -> Callable[[], None]:
    """Let `cls`, an SFTTrainer class, train with objectives, in place. Returns a function that undoes it."""
    original: Any = {
        name: getattr(cls, name) for name in ("__init__", "compute_loss", "evaluation_loop", "log")
    }
    own_attributes = {name: vars(cls).get(name) for name in original}
    signature = inspect.signature(original["__init__"])

    @functools.wraps(original["__init__"])
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(self, *args, **kwargs).arguments
        training_args = arguments.get("args")
        objective = objective_of(training_args)
        if objective is None:
            original["__init__"](self, *args, **kwargs)
            return
        check_conflicts(arguments, objective.name, liger_is_whole=not HAS_FUSED_HEAD)
        with _stand_in(training_args):
            original["__init__"](self, *args, **kwargs)
        head = add_gated_head(self.model, objective, with_entropy=True, output_class=TRLOutput)
        keep_cpu_weights_unpacked(self.model)
        self._gating = GatedTraining(head)

    @functools.wraps(original["compute_loss"])
    def compute_loss(
        self: Any,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        gating = _gating_of(self)
        if gating is None:
            return original["compute_loss"](self, model, inputs, return_outputs, num_items_in_batch)
        training = self.model.training
        # TRL 1.16 takes the logits for compute_metrics from a second forward pass; 1.9 has to be helped.
        wants_logits = not HAS_FUSED_HEAD and inputs.get("_prediction_loss_only") is False
        with _stand_in(self.args), gating.scoring(training):
            result = original["compute_loss"](
                self, model, inputs, return_outputs, num_items_in_batch
            )
        if return_outputs and wants_logits and not training:
            unlabelled = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels")}
            with torch.no_grad():
                return result[0], {"logits": model(**unlabelled).logits}
        return result

    @functools.wraps(original["evaluation_loop"])
    def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        gating = _gating_of(self)
        if gating is None:
            return original["evaluation_loop"](self, *args, **kwargs)
        gating.start_evaluation()
        output = original["evaluation_loop"](self, *args, **kwargs)
        bound = inspect.signature(original["evaluation_loop"]).bind(self, *args, **kwargs)
        prefix = bound.arguments.get("metric_key_prefix", "eval")
        means = gating.eval_means(self.args.device)
        # In the output rather than in the log alone, so that metric_for_best_model="eval_nll" works.
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        _drop_unweighted(self, "eval", means)
        return output

    @functools.wraps(original["log"])
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        gating = _gating_of(self)
        # Trainer's own training log, which every rank writes: the means are collective.
        if gating is not None and self.model.training and "loss" in logs:
            means = gating.train_means(self.args.device)
            logs.update(means)
            _drop_unweighted(self, "train", means)
        original["log"](self, logs, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    cls.compute_loss = compute_loss  # type: ignore[attr-defined]
    cls.evaluation_loop = evaluation_loop  # type: ignore[attr-defined]
    cls.log = log  # type: ignore[attr-defined]

    def undo() -> None:
        for name, attribute in own_attributes.items():
            if attribute is None:
                delattr(cls, name)
            else:
                setattr(cls, name, attribute)

    return undo


def _gating_of(trainer: Any) -> GatedTraining | None:
    """The trainer's gating; None for TRL's own loss types and inside a wrapper of a subclass."""
    gating: GatedTraining | None = trainer.__dict__.get("_gating")
    return None if gating is None or trainer.args.loss_type == STAND_IN_LOSS_TYPE else gating


@contextmanager
def _stand_in(args: Any) -> Iterator[None]:
    """Show TRL one of its own loss types for as long as its code runs."""
    loss_type = args.loss_type
    args.loss_type = STAND_IN_LOSS_TYPE
    try:
        yield
    finally:
        args.loss_type = loss_type


def _drop_unweighted(trainer: Any, mode: str, means: dict[str, float]) -> None:
    """Forget TRL's means of micro-batch means where the log has token-weighted ones of that name."""
    for name in means:
        trainer._metrics[mode].pop(name, None)


class SFTTrainer(trl.SFTTrainer):
    """`trl.SFTTrainer` whose `args.loss_type` also takes the objectives' names.

    All of TRL's arguments, data formats and methods work as they are documented there. With an objective,
    the log has the metrics of `deft_plugin.metrics.METRICS` for training and evaluation.

    Raises:
        ValueError: before data is prepared, for an unknown loss_type or parameter, label smoothing, a
            compute_loss_func, Liger's cross-entropy, an adapter on lm_head, a multi-modal model.
    """


extend_config_class(SFTConfig)
extend_trainer_class(SFTTrainer)

_undo: list[Callable[[], None]] = []


def register() -> None:
    """Let TRL's own SFTConfig and SFTTrainer take the objectives' names as `loss_type`.

    The classes are extended in place, so it does not matter whether they were imported before. "nll" and
    "dft" stay TRL's own losses. Calling it again changes nothing; `unregister` undoes it.
    """
    if not _undo:
        _undo.append(extend_config_class(trl.SFTConfig))
        _undo.append(extend_trainer_class(trl.SFTTrainer))


def unregister() -> None:
    """Undo `register`."""
    while _undo:
        _undo.pop()()
