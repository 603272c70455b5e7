"""Objectives in TRL's SFTTrainer: what `loss_type="deft"` does, for TRL 1.16 and 1.9.

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
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import trl
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from trl.trainer import sft_trainer

from ..checks import check_data
from ..head import GatedCausalLMOutput, add_gated_head, causal_lm_of, gated_head_of
from ..objectives import Objective
from ..ops import CoreSettings
from ..ops.availability import chooses_triton
from ..quantization import keep_cpu_weights_unpacked
from ..training import GatedTraining, own_rows
from .config import (
    HAS_FUSED_HEAD,
    SFTConfig,
    core_settings_of,
    extend_config_class,
    objective_of,
)
from .conflicts import check_conflicts, check_unchanged

STAND_IN_LOSS_TYPE = "nll" if HAS_FUSED_HEAD else "chunked_nll"
_ADDS_TRL_HEAD = "add_fused_lm_head" if HAS_FUSED_HEAD else "_patch_chunked_ce_lm_head"


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


_EXTENDED_METHODS = (
    "__init__",
    "train",
    "get_batch_samples",
    "training_step",
    "prediction_step",
    "compute_loss",
    "evaluation_loop",
    "log",
)


def extend_trainer_class(cls: type) -> Callable[[], None]:
    """Let `cls`, an SFTTrainer class, train with objectives, in place. Returns a function that undoes it."""
    original: Any = {name: getattr(cls, name) for name in _EXTENDED_METHODS}
    own_attributes = {name: vars(cls).get(name) for name in original}
    signature = inspect.signature(original["__init__"])

    @functools.wraps(original["__init__"])
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(self, *args, **kwargs).arguments
        training_args: Any = arguments.get("args")
        objective = objective_of(training_args)
        _remove_gated_head(arguments["model"])
        if objective is None:
            original["__init__"](self, *args, **kwargs)
            return
        settings = core_settings_of(training_args)
        chooses_triton(settings.path, training_args.device)
        check_conflicts(arguments, objective.name, liger_is_whole=not HAS_FUSED_HEAD)
        with _stand_in(training_args), _without_trls_head():
            try:
                original["__init__"](self, *args, **kwargs)
            except StopIteration:
                raise ValueError("train_dataset or eval_dataset, a stream, has no rows.") from None
        self._gating = _install(self, objective, settings)
        _check_data(self, arguments)

    @functools.wraps(original["train"])
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        gating = _gating_of(self)
        if gating is not None:
            gating.start_training()
        return original["train"](self, *args, **kwargs)

    @functools.wraps(original["get_batch_samples"])
    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches, num_items_in_batch = original["get_batch_samples"](self, *args, **kwargs)
        gating = _gating_of(self)
        if gating is not None:
            gating.start_step(self, batches)
        return batches, num_items_in_batch

    # The whole step, so that a subclass with a compute_loss of its own is seen too.
    @functools.wraps(original["training_step"])
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        gating = _gating_of(self)
        with nullcontext() if gating is None else gating.scoring(training=True):
            return original["training_step"](self, *args, **kwargs)

    @functools.wraps(original["prediction_step"])
    def prediction_step(
        self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        gating = _gating_of(self)
        if gating is None or inputs.get("labels") is None:
            return original["prediction_step"](self, model, inputs, *args, **kwargs)
        rows = own_rows(self, inputs["labels"])
        with gating.scoring(training=False, rows=rows):
            return original["prediction_step"](self, model, inputs, *args, **kwargs)

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
        check_unchanged(self, gating.head.objective.name)
        # TRL 1.16 takes the logits for compute_metrics from a second forward pass; 1.9 has to be helped.
        wants_logits = not HAS_FUSED_HEAD and inputs.get("_prediction_loss_only") is False
        with _stand_in(self.args):
            result = original["compute_loss"](
                self, model, inputs, return_outputs, num_items_in_batch
            )
        # TRL's means of micro-batch means; the log has token-weighted ones of the same names.
        for name in ("entropy", "mean_token_accuracy"):
            self._metrics["train" if self.model.training else "eval"].pop(name, None)
        if return_outputs and wants_logits:
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
        return output

    @functools.wraps(original["log"])
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        gating = _gating_of(self)
        # Trainer's own training log, which every rank writes: the means are collective.
        if gating is not None and "loss" in logs:
            logs.update(gating.train_means(self.args.device))
        original["log"](self, logs, *args, **kwargs)

    extensions = (
        __init__,
        train,
        get_batch_samples,
        training_step,
        prediction_step,
        compute_loss,
        evaluation_loop,
        log,
    )
    # Not by their __name__, which is that of what they wrap: another patch's function may have another.
    for name, extension in zip(_EXTENDED_METHODS, extensions, strict=True):
        setattr(cls, name, extension)

    def undo() -> None:
        for name, attribute in own_attributes.items():
            if attribute is None:
                delattr(cls, name)
            else:
                setattr(cls, name, attribute)

    return undo


def _install(trainer: Any, objective: Objective, settings: CoreSettings) -> GatedTraining:
    """Give a new trainer's model its gated head."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"One process with {trainer.args.n_gpu} GPUs would use torch.nn.DataParallel, which "
            f"loss_type={objective.name!r} does not support. Start one process per GPU with accelerate "
            "launch or torchrun, or show one GPU: CUDA_VISIBLE_DEVICES=0."
        )
    # TRL 1.9 sets the coefficient in the configuration; models keep a copy, which the head reads.
    model = causal_lm_of(trainer.model)
    if hasattr(model, "router_aux_loss_coef"):
        model.router_aux_loss_coef = model.config.router_aux_loss_coef
    head = add_gated_head(
        trainer.model, objective, with_entropy=True, output_class=TRLOutput, **asdict(settings)
    )
    keep_cpu_weights_unpacked(trainer.model)
    # Trainer has looked at the model before it had a gated head, which shifts labels and takes
    # num_items_in_batch whatever the model's own forward does.
    trainer.model_accepts_loss_kwargs = True
    trainer._loss_shifts_labels = True
    return GatedTraining(trainer, head)


def _check_data(trainer: Any, arguments: dict[str, Any]) -> None:
    """Look at what TRL has made of the data sets it was given."""
    for name, packs in (
        ("train_dataset", trainer.args.packing),
        ("eval_dataset", _packs_eval(trainer.args)),
    ):
        prepared = getattr(trainer, name)
        given: Any = arguments.get(name)
        many = isinstance(prepared, dict)
        for key in prepared if many else [None]:
            cuts_ends = trainer.args.truncation_mode == "keep_start"
            check_data(
                f"{name}[{key!r}]" if many else name,
                prepared[key] if many else prepared,
                causal_lm_of(trainer.model),
                warn=trainer.is_world_process_zero(),
                given=given[key] if many else given,
                max_length=None if packs else trainer.args.max_length,
                end=trainer.processing_class.eos_token_id if cuts_ends else None,
            )


def _packs_eval(args: Any) -> bool:
    return bool(args.packing if args.eval_packing is None else args.eval_packing)


def _remove_gated_head(model: Any) -> None:
    """Take the gated head of an earlier trainer off the model: it is `loss_type` that decides."""
    head = None if isinstance(model, str) else gated_head_of(model)
    if head is not None:
        # That trainer's mixed precision is a wrapper around the forward.
        extract_model_from_parallel(model, keep_fp32_wrapper=False)
        head.remove()


def _gating_of(trainer: Any) -> GatedTraining | None:
    """The trainer's gating; None for TRL's own loss types."""
    gating: GatedTraining | None = trainer.__dict__.get("_gating")
    return gating


@contextmanager
def _stand_in(args: Any) -> Iterator[None]:
    """Show TRL one of its own loss types for as long as its code runs."""
    loss_type = args.loss_type
    args.loss_type = STAND_IN_LOSS_TYPE
    try:
        yield
    finally:
        args.loss_type = loss_type


@contextmanager
def _without_trls_head() -> Iterator[None]:
    """Keep TRL from giving the model a fused head of its own, which would stay under the gated one."""
    add_head = getattr(sft_trainer, _ADDS_TRL_HEAD)
    setattr(sft_trainer, _ADDS_TRL_HEAD, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(sft_trainer, _ADDS_TRL_HEAD, add_head)


class SFTTrainer(trl.SFTTrainer):
    """`trl.SFTTrainer` whose `args.loss_type` also takes the objectives' names.

    All of TRL's arguments, data formats and methods work as they are documented there. With an objective,
    the log has the metrics of `deft_plugin.metrics.METRICS` for training and evaluation. The model keeps its
    gated head: after training too, `model(..., labels=...).loss` is the objective, until
    `deft_plugin.gated_head_of(model).remove()` or another trainer.

    Raises:
        ValueError: before data is prepared, for an unknown loss_type or parameter, label smoothing, a
            compute_loss_func, Liger's cross-entropy, an adapter on lm_head, a multi-modal model, context
            or sequence parallelism, a path that cannot run; after it, for a model that cannot have a gated
            head (see `deft_plugin.add_gated_head`) or has NaN weights, for data that cannot be trained on
            (see `deft_plugin.checks.check_data`), and for several GPUs in one process.
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
