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
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import trl
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from trl.trainer import sft_trainer

from ..checks import check_data, tokenizer_of
from ..head import GatedCausalLMOutput, add_gated_head, causal_lm_of, gated_head_of
from ..head.cpu_weights import keep_cpu_weights_unpacked
from ..head.substitution import attribute_of
from ..objectives import Objective
from ..ops import CoreSettings
from ..ops.availability import resolve_path
from ..parallelism import check_lengths, count_tokens_of_step, scoring_parts
from ..training import GatedTraining, TrainingSettings, own_rows
from .config import (
    HAS_FUSED_HEAD,
    SFTConfig,
    check_metric_for_best_model,
    extend_config_class,
    objective_of,
    settings_of,
)
from .conflicts import check_conflicts, check_unchanged

logger = logging.getLogger("deft_plugin")

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


_EXTENDED_METHODS = (
    "__init__",
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
    names = _argument_names(cls)

    @functools.wraps(original["__init__"])
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        training_args: Any = arguments.get("args")
        objective = objective_of(training_args)
        _remove_gated_head(arguments.get("model"))
        if objective is None:
            # A subclass's code and compute_metrics may have metrics of any name.
            if type(self) is cls and arguments.get("compute_metrics") is None:
                check_metric_for_best_model(training_args)
            original["__init__"](self, *args, **kwargs)
            return
        core, training = settings_of(training_args)
        resolve_path(core.path, training_args.device)
        check_conflicts(type(self), arguments, objective.name)
        _keep_ligers_other_kernels(training_args, objective.name)
        with _stand_in(training_args), _without_trls_head():
            try:
                original["__init__"](self, *args, **kwargs)
            except StopIteration:
                raise ValueError("train_dataset or eval_dataset, a stream, has no rows.") from None
        self._gating = _install(self, objective, core, training)
        _check_data(self, arguments)

    @functools.wraps(original["get_batch_samples"])
    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches, num_items_in_batch = original["get_batch_samples"](self, *args, **kwargs)
        gating = _gating_of(self)
        if gating is not None:
            check_lengths(self, batches)
            num_items_in_batch = count_tokens_of_step(self, batches, num_items_in_batch)
            gating.start_step(self, batches)
        return batches, num_items_in_batch

    # The whole step, so that a subclass with a compute_loss of its own is seen too.
    @functools.wraps(original["training_step"])
    def training_step(
        self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        gating = _gating_of(self)
        with nullcontext() if gating is None else gating.scoring(training=True, batch=inputs):
            return original["training_step"](self, model, inputs, *args, **kwargs)

    @functools.wraps(original["prediction_step"])
    def prediction_step(
        self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        gating = _gating_of(self)
        if gating is None or inputs.get("labels") is None:
            return original["prediction_step"](self, model, inputs, *args, **kwargs)
        rows = own_rows(self, inputs["labels"])
        with gating.scoring(training=False, rows=rows, batch=inputs):
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
        # transformers asks Liger's cross-entropy for it, which is switched off.
        inputs.pop("skip_logits", None)
        parts = scoring_parts(self, num_items_in_batch)
        with _stand_in(self.args, STAND_IN_LOSS_TYPE), parts:
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
    def evaluation_loop(self: Any, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        gating = _gating_of(self)
        if gating is None:
            return original["evaluation_loop"](self, dataloader, *args, **kwargs)
        with gating.evaluating(dataloader):
            output = original["evaluation_loop"](self, dataloader, *args, **kwargs)
        signature = inspect.signature(original["evaluation_loop"])
        bound = signature.bind(self, dataloader, *args, **kwargs)
        prefix = bound.arguments.get("metric_key_prefix", "eval")
        means = gating.eval_means(prefix, self.args.device)
        # In the output rather than in the log alone, so that metric_for_best_model="eval_nll" works.
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    @functools.wraps(original["log"])
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        gating = _gating_of(self)
        if gating is not None:
            gating.add_means(logs, self.args.device)
        original["log"](self, logs, *args, **kwargs)

    extensions = (
        __init__,
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


def _argument_names(cls: type) -> list[str]:
    """The names of an SFTTrainer's positional arguments: TRL's, where a subclass, Unsloth's, says *args alone."""
    signatures = (
        inspect.signature(vars(c)["__init__"]) for c in cls.__mro__ if "__init__" in vars(c)
    )
    return next(list(s.parameters)[1:] for s in signatures if "model" in s.parameters)


def _install(
    trainer: Any, objective: Objective, core: CoreSettings, training: TrainingSettings
) -> GatedTraining:
    """Give a new trainer's model its gated head."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"One process with {trainer.args.n_gpu} GPUs would use torch.nn.DataParallel, which "
            f"loss_type={objective.name!r} does not support. Start one process per GPU with accelerate "
            "launch or torchrun, or show one GPU: CUDA_VISIBLE_DEVICES=0."
        )
    # TRL 1.9 sets the coefficient in the configuration; most models keep a copy, which their forward reads.
    model = causal_lm_of(trainer.model)
    coefficient = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    if hasattr(model, "router_aux_loss_coef") and coefficient is not None:
        model.router_aux_loss_coef = coefficient
    head = add_gated_head(
        trainer.model, objective, with_entropy=True, output_class=TRLOutput, **asdict(core)
    )
    keep_cpu_weights_unpacked(trainer.model)
    # Trainer has looked at the model before it had a gated head, which shifts labels and takes
    # num_items_in_batch whatever the model's own forward does.
    trainer.model_accepts_loss_kwargs = True
    trainer._loss_shifts_labels = True
    return GatedTraining(trainer, head, training)


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
            end = tokenizer_of(trainer.processing_class).eos_token_id
            check_data(
                f"{name}[{key!r}]" if many else name,
                prepared[key] if many else prepared,
                causal_lm_of(trainer.model),
                warn=trainer.is_world_process_zero(),
                given=given[key] if many else given,
                max_length=None if packs else trainer.args.max_length,
                end=end if cuts_ends else None,
            )


def _packs_eval(args: Any) -> bool:
    return bool(args.packing if args.eval_packing is None else args.eval_packing)


def _remove_gated_head(model: Any) -> None:
    """Take the gated head of an earlier trainer off the model: it is `loss_type` that decides."""
    head = gated_head_of(model) if isinstance(model, nn.Module) else None
    if head is not None:
        # That trainer's mixed precision is a wrapper around the forward, and TRL's heads, of trainers after it, too.
        extract_model_from_parallel(model, keep_fp32_wrapper=False)
        _remove_trls_heads(head.model)
        head.remove()


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


def _gating_of(trainer: Any) -> GatedTraining | None:
    """The trainer's gating; None for TRL's own loss types."""
    gating: GatedTraining | None = trainer.__dict__.get("_gating")
    return gating


def _keep_ligers_other_kernels(args: Any, loss_type: str) -> None:
    """Switch Liger's cross-entropies off: what they are for, saving memory, the gated head does."""
    if args.use_liger_kernel:
        replaced = dict.fromkeys(("fused_linear_cross_entropy", "cross_entropy"), False)
        args.liger_kernel_config = {**(args.liger_kernel_config or {}), **replaced}
        logger.warning(
            "use_liger_kernel=True: loss_type=%r takes the place of Liger's fused cross-entropy, as sparing with "
            "memory; its other kernels are used.",
            loss_type,
        )


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


class SFTTrainer(trl.SFTTrainer):
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
