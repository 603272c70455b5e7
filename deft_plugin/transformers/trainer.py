"""transformers.Trainer with a gated head: `GatedTrainer(..., loss_type="deft")`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from ..checks import check_rows, data_sets_of, stored_columns
from ..conflicts import check_other_losses, check_parallelism, check_trainer
from ..head import causal_lm_of, check_model
from ..metrics import is_best_smallest
from ..objectives import Objective
from ..ops.availability import resolve_path
from ..sizes import check_sizes
from ..trainer import GatedTrainerMixin, earlier_head_on, keep_ligers_other_kernels
from ..training import build_for_trainer, parse_parameters, split_parameters

logger = logging.getLogger("deft_plugin")

_ARGUMENT_NAMES = list(inspect.signature(Trainer.__init__).parameters)[1:]
_PADDING = (DataCollatorWithPadding, DataCollatorForSeq2Seq)
_LABELS = {"labels", "label", "label_ids"}
_LABELLING = "DataCollatorForLanguageModeling(tokenizer, mlm=False) makes them of input_ids."


class GatedTrainer(GatedTrainerMixin):
    """`transformers.Trainer` whose loss is an objective of a causal LM's next tokens, computed without logits.

    A drop-in for `Trainer`: all its arguments and methods work as they are documented there. It can be inherited from,
    also beside a trainer of one's own (`class Mine(GatedTrainer, MyTrainer)`). The loss is the sum over the optimizer step's tokens on
    all ranks divided by their number. The log, and what `evaluate` and `predict` return, have the metrics of
    `deft_plugin.metrics.METRICS`. `compute_metrics` and `predict` get logits from a forward pass more, without labels.
    The model keeps its gated head: after training too, `model(..., labels=...).loss` is the objective, until
    `deft_plugin.gated_head_of(model).remove()` or another trainer.

    Args:
        model, args, others, kwargs: `Trainer`'s.
        loss_type: a registered name or an `Objective`.
        loss_kwargs: the named objective's parameters, a dict or JSON text; also path, tile_rows and skip_below (see
            `deft_plugin.linear_gated_loss`) and histograms.

    Raises:
        ValueError: before data is touched, for an unknown loss_type or parameter, batches of nothing, label smoothing, a
            compute_loss_func, a subclass with a loss of its own on logits, an objective that couples the tokens of
            parts of sequences, a path that cannot run, a model that is no causal LM, a collator that makes other labels
            or none; after it, for a model that cannot have a gated head (see `deft_plugin.add_gated_head`) or has
            NaN weights, for data that cannot be trained on (see `deft_plugin.checks.check_data`), and for several
            GPUs in one process.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
        loss_type: str | Objective = "deft",
        loss_kwargs: dict[str, Any] | str | None = None,
        **kwargs: Any,
    ) -> None:
        core, training, parameters = split_parameters(parse_parameters(loss_kwargs))
        objective = build_for_trainer(loss_type, parameters)
        if args is None:
            args = TrainingArguments(output_dir="tmp_trainer")
        resolve_path(core.path, args.device)
        arguments = {**dict(zip(_ARGUMENT_NAMES[2:], others, strict=False)), **kwargs}
        _check_conflicts(type(self), model, args, arguments, objective)
        _prefer_small(args)
        keep_ligers_other_kernels(args, objective.name)
        if (earlier := earlier_head_on(model)) is not None:
            earlier.remove()
        super().__init__(model, args, *others, **kwargs)
        self._settings = (objective, core, training)
        self.install(*self._settings)
        self.check_data_sets()

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The model of `model_init`, which `train` and each trial of a search make anew, with a gated head."""
        model: nn.Module = super().call_model_init(*args, **kwargs)
        if self._gating is not None:
            self._gating.retire(self)
            self.model = model
            self.install(*self._settings)
        return model


def _check_conflicts(
    trainer_class: type,
    model: Any,
    args: TrainingArguments,
    arguments: Mapping[str, Any],
    objective: Objective,
) -> None:
    """Raise `ValueError` for a set-up in which the objective would not be what trains."""
    check_sizes(args)
    check_other_losses(args, arguments.get("compute_loss_func"), objective.name)
    check_parallelism(args, objective)
    instead = "Use it with transformers.Trainer, or use GatedTrainer."
    check_trainer(trainer_class, "GatedTrainer", instead, objective.name)
    if isinstance(model, str):
        raise ValueError(
            f"model={model!r}: transformers' trainers take the model itself. Load it with "
            "AutoModelForCausalLM.from_pretrained."
        )
    if model is not None:
        check_model(causal_lm_of(model))
    _check_collator(arguments.get("data_collator"))
    for name in ("train_dataset", "eval_dataset"):
        check_rows(name, arguments.get(name))
        # A subclass's own loader may make other columns.
        if trainer_class.get_train_dataloader is Trainer.get_train_dataloader:  # type: ignore[attr-defined]
            _check_labels(name, arguments.get(name), arguments.get("data_collator"))


def _check_collator(collator: Any) -> None:
    if getattr(collator, "mlm", False):
        raise ValueError(
            f"data_collator has mlm=True: its labels are masked tokens, and a causal LM's are the next. {_LABELLING}"
        )


def _check_labels(name: str, dataset: Any, collator: Any) -> None:
    """Refuse data without labels where the collator, one of transformers' own, makes none, or has nothing to make them of."""
    is_default = collator is None or collator is default_data_collator
    pads_alone = is_default or type(collator) in _PADDING
    if not pads_alone and type(collator) is not DataCollatorForLanguageModeling:
        return
    for each, part in data_sets_of(name, dataset).items():
        columns = stored_columns(part)
        if not columns or _LABELS & set(columns):
            continue
        if "input_ids" not in columns:
            raise ValueError(
                f"{each} has neither input_ids nor labels, but the columns {', '.join(columns)}. transformers' trainers "
                "prepare no text: make tokens of it first, or use deft_plugin.trl.SFTTrainer."
            )
        if pads_alone:
            raise ValueError(
                f"{each} has no labels, but the columns {', '.join(columns)}, and data_collator adds none. {_LABELLING}"
            )


def _prefer_small(args: TrainingArguments) -> None:
    """Have the smallest nll chosen: transformers has made it a score when the arguments were made."""
    if args.greater_is_better and is_best_smallest(args.metric_for_best_model):
        args.greater_is_better = False
        logger.warning(
            "metric_for_best_model=%r: greater_is_better set to False, since less is better.",
            args.metric_for_best_model,
        )
