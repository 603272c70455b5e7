"""SFTTrainer with objectives: what `loss_type="deft"` does, for TRL 1.16 and 1.9.

A training run with an objective is TRL's own run in which

1. conflicts are refused before anything is loaded;
2. TRL is told one of its own loss types, whose code reads the loss off the model's output;
3. the model has a gated head in place of TRL's, whose output has the names that this code reads;
4. metrics of every scored token go to the log.

TRL's normalisation, gradient accumulation, logging and evaluation are untouched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor, nn
from trl.trainer import sft_trainer

from ..checks import check_data, data_sets_of, tokenizer_of
from ..conflicts import check_other_losses
from ..head import GatedCausalLMOutput, causal_lm_of
from ..head.substitution import attribute_of
from ..ops.availability import resolve_path
from ..run_log import keep_log
from ..trainer import (
    GatedTrainerMixin,
    earlier_head_on,
    keep_ligers_other_kernels,
    without_labels,
)
from .columns import check_given_columns
from .config import (
    HAS_FUSED_HEAD,
    check_metric_for_best_model,
    objective_of,
    own_loss_of,
    settings_of,
)
from .conflicts import check_conflicts, check_loss_type

# The one whose code reads what a gated output has.
STAND_IN_LOSS_TYPE = "nll" if HAS_FUSED_HEAD else "chunked_nll"
# What these functions make a model's forward.
_TRLS_FORWARDS = ("_fused_forward", "_chunked_ce_forward")


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


class GatedSFTMixin(GatedTrainerMixin):
    """What TRL's SFTTrainer needs beside transformers' Trainer. Comes before it among the bases."""

    _predicts_logits = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        gating = self.gating
        if gating is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        check_loss_type(self.args, gating.head.objective.name)
        # TRL 1.16 takes the logits for compute_metrics from a second forward pass; 1.9 has to be helped.
        wants_logits = not HAS_FUSED_HEAD and inputs.get("_prediction_loss_only") is False
        with _stand_in(self.args, STAND_IN_LOSS_TYPE):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # TRL's means of micro-batch means; the log has token-weighted ones of the same names.
        for name in ("entropy", "mean_token_accuracy"):
            self._metrics["train" if self.model.training else "eval"].pop(name, None)
        if return_outputs and wants_logits:
            with torch.no_grad():
                return result[0], {"logits": model(**without_labels(inputs)).logits}
        return result


class SFTTrainer(GatedSFTMixin, trl.SFTTrainer):
    """`trl.SFTTrainer` whose `args.loss_type` also takes the objectives' names.

    All of TRL's arguments, data formats and methods work as they are documented there. With an objective,
    the log has the metrics of `deft_plugin.metrics.METRICS` for training and evaluation. The model keeps its
    gated head: after training too, `model(..., labels=...).loss` is the objective, until
    `deft_plugin.gated_head_of(model).remove()` or another trainer.

    Raises:
        ValueError: before data is prepared, for an unknown loss_type or parameter, label smoothing, a
            compute_loss_func, an adapter on lm_head that is neither LoRA nor trainable tokens (DoRA, for one), a
            subclass with a loss of its own on logits, an objective that couples the tokens of parts of sequences, a
            path that cannot run, a metric_for_best_model that TRL's own losses do not log; after it, for a model that
            cannot have a gated head (see `deft_plugin.add_gated_head`) or has NaN weights, for data that cannot
            be trained on (see `deft_plugin.checks.check_data`), and for several GPUs in one process.
    """

    @functools.wraps(trl.SFTTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        initialise(self, SFTTrainer, super().__init__, args, kwargs)


def initialise(
    trainer: Any,
    trainer_class: type,
    own_init: Callable[..., None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Make an SFTTrainer, with a gated head where its arguments ask for an objective.

    Args:
        trainer: a `GatedSFTMixin` where they do.
        trainer_class: the SFTTrainer that users know, of which `trainer` may be a subclass.
        own_init: TRL's `__init__`, bound.
        args, kwargs: what `own_init` is called with.
    """
    arguments = arguments_of(trainer_class, args, kwargs)
    training_args: Any = arguments.get("args")
    objective = objective_of(training_args)
    if (earlier := earlier_head_on(arguments.get("model"))) is not None:
        # TRL's heads, of trainers after that one, are wrappers too.
        _remove_trls_heads(earlier.model)
        earlier.remove()
    if objective is None:
        # A subclass's code and compute_metrics may have metrics of any name.
        if type(trainer) is trainer_class and arguments.get("compute_metrics") is None:
            check_metric_for_best_model(training_args)
        _check_columns(trainer, arguments)
        own_init(*args, **kwargs)
        keep_log(trainer, _own_loss(trainer, arguments))
        return
    core, training = settings_of(training_args)
    resolve_path(core.path, training_args.device)
    check_conflicts(type(trainer), arguments, objective.name)
    _check_columns(trainer, arguments)
    keep_ligers_other_kernels(training_args, objective.name)
    with _stand_in(training_args), _without_trls_head():
        try:
            own_init(*args, **kwargs)
        except StopIteration:
            raise ValueError("train_dataset or eval_dataset, a stream, has no rows.") from None
    _copy_router_coefficient(causal_lm_of(trainer.model))
    trainer.install(objective, core, training, output_class=TRLOutput)
    _check_data(trainer, arguments)


def arguments_of(
    trainer_class: type, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """An SFTTrainer's arguments by name: TRL's names, where a subclass, Unsloth's, says *args alone."""
    signatures = (
        inspect.signature(vars(c)["__init__"])
        for c in trainer_class.__mro__
        if "__init__" in vars(c)
    )
    names = next(list(s.parameters)[1:] for s in signatures if "model" in s.parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _copy_router_coefficient(model: Any) -> None:
    # TRL 1.9 sets it in the configuration; most models keep a copy, which their forward reads.
    coefficient = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    if hasattr(model, "router_aux_loss_coef") and coefficient is not None:
        model.router_aux_loss_coef = coefficient


def _own_loss(trainer: Any, arguments: dict[str, Any]) -> str | None:
    """The name of TRL's own loss, where that is what trains."""
    mine = [c for c in type(trainer).__mro__ if "compute_loss" in vars(c)]
    # A subclass's, for distillation say, comes before TRL's and this package's.
    if not mine[0].__module__.startswith(("deft_plugin.", "trl.trainer.sft_trainer")):
        return None
    try:
        check_other_losses(trainer.args, arguments.get("compute_loss_func"), "nll")
    except ValueError:
        return None
    return own_loss_of(trainer.args)


def _check_columns(trainer: Any, arguments: dict[str, Any]) -> None:
    """Look at what TRL is given to make tokens of, where it is TRL that does."""
    if type(trainer)._prepare_dataset is trl.SFTTrainer._prepare_dataset:
        check_given_columns(arguments)


def _check_data(trainer: Any, arguments: dict[str, Any]) -> None:
    """Look at what TRL has made of the data sets it was given."""
    args = trainer.args
    eval_packing = args.packing if args.eval_packing is None else args.eval_packing
    cuts_ends = args.truncation_mode == "keep_start"
    end = tokenizer_of(trainer.processing_class).eos_token_id
    for attribute, packs in (("train_dataset", args.packing), ("eval_dataset", eval_packing)):
        given = data_sets_of(attribute, arguments.get(attribute))
        for name, prepared in data_sets_of(attribute, getattr(trainer, attribute)).items():
            check_data(
                name,
                prepared,
                causal_lm_of(trainer.model),
                warn=trainer.is_world_process_zero(),
                given=given[name],
                max_length=None if packs else args.max_length,
                end=end if cuts_ends else None,
            )


def _remove_trls_heads(model: Any) -> None:
    """Give the model the forward back that it had before TRL's trainers, one or several, put theirs over it."""
    while True:
        function: Any = getattr(vars(model).get("forward"), "__func__", None)
        code = getattr(function, "__code__", None)
        if code is None or code.co_name not in _TRLS_FORWARDS:
            return
        original = inspect.getclosurevars(function).nonlocals["original_forward"]
        del model.forward
        if getattr(original, "__func__", None) is not type(model).forward:
            model.forward = original


@contextmanager
def _stand_in(args: Any, loss_type: str = "nll") -> Iterator[None]:
    """Show TRL one of its own loss types for as long as its code runs, and 1.9 no Liger, whose loss it would read."""
    shown: dict[str, Any] = {"loss_type": loss_type}
    if not HAS_FUSED_HEAD:
        shown["use_liger_kernel"] = False
    with ExitStack() as stack:
        for name, value in shown.items():
            stack.enter_context(attribute_of(args, name, value))
        yield


@contextmanager
def _without_trls_head() -> Iterator[None]:
    """Keep TRL from giving the model a fused head of its own, and from refusing an adapter on lm_head for its sake."""
    with ExitStack() as stack:
        if HAS_FUSED_HEAD:
            stack.enter_context(attribute_of(sft_trainer, "add_fused_lm_head", _add_no_head))
            stack.enter_context(attribute_of(sft_trainer, "BaseTunerLayer", _NoLayer))
        yield


def _add_no_head(*args: Any, **kwargs: Any) -> None:
    pass


class _NoLayer:
    """A class that no layer is an instance of."""
