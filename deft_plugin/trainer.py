"""What a trainer with a gated head does, for transformers.Trainer and every trainer derived from it.

Around each of Trainer's methods that has to do with the loss, and nothing else:

    get_batch_samples     the objective gets ready for the optimizer step
    training_step         proof that the gated head scored the batch; its metrics
    compute_loss          no other loss has been set since; the loss of sequences in parts
    get_*_dataloader      evaluations have all rows
    prediction_step       as training_step; logits, where asked for, of a forward pass more
    _issue_warnings_...   what a checkpoint without some of the weights leaves as it was
    evaluation_loop, log  the metrics, for `metric_for_best_model` and the log

TRL's, Axolotl's and transformers' own trainers get it by inheritance, before their class among the bases.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from .checks import check_data, data_sets_of
from .conflicts import check_unchanged
from .head import GatedCausalLMOutput, GatedHead, add_gated_head, gated_head_of
from .head.cpu_weights import keep_cpu_weights_unpacked
from .head.substitution import attribute_of
from .metrics import METRICS, is_of_evaluations
from .objectives import Objective
from .ops import CoreSettings
from .parallelism import check_lengths, count_tokens_of_step, scoring_parts
from .run_log import keep_log, unusual_parameters
from .training import GatedTraining, TrainingSettings, own_rows

logger = logging.getLogger("deft_plugin")


class GatedTrainerMixin(Trainer):
    """A trainer whose loss is an objective's from `install` on; until then it is as without this class."""

    _gating: GatedTraining | None = None
    # Whether the trainer's own prediction_step takes logits from a forward pass without labels.
    _predicts_logits = False
    # The setting by which longer rows have been left out or cut before the trainer was made, if any.
    _left_out_above: str | None = None
    _loads_best = False
    # What the trainer's own log adds to an evaluation's metrics.
    _more_metrics: tuple[str, ...] = ()

    @property
    def gating(self) -> GatedTraining | None:
        """The gated head with its metrics; None where the loss is the trainer's own."""
        return self._gating

    def install(
        self,
        objective: Objective,
        core: CoreSettings,
        training: TrainingSettings | None = None,
        output_class: type[GatedCausalLMOutput] = GatedCausalLMOutput,
    ) -> None:
        """Give the model its gated head.

        Args:
            objective: what labels are scored with.
            core: how the loss is computed.
            training: settings beside those.
            output_class: what a gated forward returns.

        Raises:
            ValueError: the model cannot have one (see `deft_plugin.add_gated_head`), would be copied to
                several GPUs, or has NaN weights; the tokenizer pads with a token that the model does not have.
        """
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process with {self.args.n_gpu} GPUs would use torch.nn.DataParallel, which objective "
                f"{objective.name!r} does not support. Start one process per GPU with accelerate launch, torchrun or "
                "axolotl train, or show one GPU: CUDA_VISIBLE_DEVICES=0."
            )
        head = add_gated_head(
            self.model, objective, with_entropy=True, output_class=output_class, **asdict(core)
        )
        keep_cpu_weights_unpacked(self.model)
        # The trainer has looked at the model, or its backbone, before it had a gated head, which shifts labels
        # and takes num_items_in_batch whatever the model's own forward does.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = not _puts_tokens_first(self.model)
        self._gating = GatedTraining(self, head, training)
        keep_log(self, objective.name, unusual_parameters(objective))
        _warn_of_unknown_metric(self)

    def check_data_sets(self) -> None:
        """Raise `ValueError` for data sets that cannot be trained on (see `checks.check_data`)."""
        assert self._gating is not None
        for attribute in ("train_dataset", "eval_dataset"):
            for name, dataset in data_sets_of(attribute, getattr(self, attribute)).items():
                warn = self.is_world_process_zero()
                check_data(
                    name,
                    dataset,
                    self._gating.head.model,
                    warn=warn,
                    left_out_above=self._left_out_above,
                )

    def check_batches(self, batches: Sequence[Any]) -> None:
        """Raise `ValueError` for a step's batches that cannot be cut into parts for several ranks."""
        check_lengths(self, batches)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        gating = self.gating
        if gating is not None:
            self.check_batches(batches)
            num_items_in_batch = count_tokens_of_step(self, batches, num_items_in_batch)
            gating.start_step(self, batches)
        return batches, num_items_in_batch

    # The whole step, so that a subclass with a compute_loss of its own is seen too.
    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        gating = self.gating
        if gating is None:
            return super().training_step(model, inputs, *args, **kwargs)
        with gating.scoring(training=True, batch=inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        # By name, as Trainer gives them: a trainer after this one may take **kwargs.
        named = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        gating = self.gating
        if gating is None:
            return super().compute_loss(model, inputs, **named)
        check_unchanged(self, gating.head.objective.name)
        # transformers asks Liger's cross-entropy for it, which is switched off.
        inputs.pop("skip_logits", None)
        with scoring_parts(self, num_items_in_batch):
            return super().compute_loss(model, inputs, **named)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._with_last_rows():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._with_last_rows():
            return super().get_test_dataloader(*args, **kwargs)

    def _with_last_rows(self) -> AbstractContextManager[None]:
        """A context in which data loaders keep an incomplete last batch: figures would depend on the batch size."""
        if self._gating is None or not self.args.dataloader_drop_last:
            return nullcontext()
        if self.is_world_process_zero():
            _tell_of_last_rows()
        return attribute_of(self.args, "dataloader_drop_last", False)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        predict = functools.partial(super().prediction_step, model, ignore_keys=ignore_keys)
        gating, labels = self.gating, inputs.get("labels")
        if gating is None or labels is None:
            return predict(inputs, prediction_loss_only)
        scoring = gating.scoring(
            training=False, rows=own_rows(self, labels), length=labels.size(1), batch=inputs
        )
        if prediction_loss_only or self._predicts_logits:
            with scoring:
                return predict(inputs, prediction_loss_only)
        # Before the loss, for which accelerate cuts sequences, labels too, into parts in place.
        _, logits, _ = predict(without_labels(inputs), False)
        if isinstance(logits, tuple):
            # Not what cannot be gathered: multi-modal models' features of images, an output of their own, and caches.
            kept = tuple(value for value in logits if isinstance(value, Tensor | tuple | list))
            logits = kept[0] if len(kept) == 1 else kept
        labels = self._prepare_input(labels.clone())
        with scoring:
            loss, _, _ = predict(inputs, True)
        return loss, logits, labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        evaluate = functools.partial(
            super().evaluation_loop,
            dataloader,
            description,
            prediction_loss_only=prediction_loss_only,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        gating = self.gating
        if gating is None:
            return evaluate()
        with gating.evaluating(dataloader):
            output = evaluate()
        _have_prepared_for_training(self)
        means = gating.eval_means(self, metric_key_prefix)
        # In the output rather than in the log alone, so that metric_for_best_model="eval_nll" works.
        output.metrics.update({f"{metric_key_prefix}_{name}": means[name] for name in means})
        return output

    def _load_best_model(self) -> None:
        with attribute_of(self, "_loads_best", True):
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        super()._issue_warnings_after_load(load_result)
        if self._gating is None:
            return
        missing = _not_loaded(self.model, load_result.missing_keys)
        if missing:
            # Not a refusal: the model may be the checkpoint's already.
            logger.warning(
                "The checkpoint lacks %s of the weights that train (%s, ...): transformers saves this model's under other names "
                "than it loads here. %s",
                f"{len(missing):,}",
                missing[0],
                "They are those of the last step, not the best ones. Load these with from_pretrained(CHECKPOINT)."
                if self._loads_best
                else "They stay as the model was given: give it that of from_pretrained(CHECKPOINT), or train an adapter.",
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._gating is not None:
            self._gating.add_means(self, logs)
        super().log(logs, *args, **kwargs)


def _puts_tokens_first(model: Any) -> bool:
    """Whether virtual tokens come before each row's, whose first is then predicted from them, as with prompt tuning."""
    config: Any = getattr(model, "active_peft_config", None)
    learns_prompt = getattr(config, "is_prompt_learning", False)
    return learns_prompt and config.peft_type not in ("PREFIX_TUNING", "CARTRIDGE")


def _not_loaded(model: nn.Module, missing: Sequence[str]) -> list[str]:
    """The names that a checkpoint lacks of parameters that train and are not tied to others that it has."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameters[name]) for name in parameters.keys() - {*missing}}
    lacking = {name: parameters[name] for name in missing if name in parameters}
    return [
        name for name, value in lacking.items() if value.requires_grad and id(value) not in loaded
    ]


def _have_prepared_for_training(trainer: Trainer) -> None:
    """Forget that the model was prepared for an evaluation, before any training.

    To accelerate a prepared model is one for training: it would go without DDP, each rank for itself.
    """
    model, accelerator = trainer.model, trainer.accelerator
    needs_ddp = accelerator.multi_device or accelerator.distributed_type == "MULTI_CPU"
    if not needs_ddp or trainer.is_in_train or _has_ddp(trainer.model_wrapped):
        return
    # Mixed precision's wrapper, which a second preparation would wrap again.
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    model._is_accelerate_prepared = False
    # Or what torch.compile has made of it.
    prepared = (model, trainer.model_wrapped)
    accelerator._models[:] = [each for each in accelerator._models if each not in prepared]
    trainer.model_wrapped = model


def _has_ddp(model: nn.Module) -> bool:
    return any(isinstance(part, DistributedDataParallel) for part in model.modules())


@functools.cache
def _tell_of_last_rows() -> None:
    logger.warning(
        "dataloader_drop_last=True is for training alone: evaluations score the rows of their last batches too."
    )


def _warn_of_unknown_metric(trainer: GatedTrainerMixin) -> None:
    """Not a refusal: a callback or a subclass may add metrics of any name."""
    args = trainer.args
    metric = args.metric_for_best_model
    if metric is None or trainer.compute_metrics is not None or args.eval_strategy == "no":
        return
    names = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else []
    is_known = is_of_evaluations(metric, names, trainer._more_metrics)
    if is_known or not trainer.is_world_process_zero():
        return
    logger.warning(
        "metric_for_best_model=%r is no metric of an evaluation, and the first will stop the run, unless code of yours adds "
        "it. Choices: %s%s.",
        metric,
        ", ".join(("loss", *METRICS)),
        f", each after {' or '.join(f'{name}_' for name in names)}" if names else "",
    )


def without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch for which the model's own forward runs, with its logits."""
    return {key: value for key, value in inputs.items() if key not in ("labels", "shift_labels")}


def earlier_head_on(model: Any) -> GatedHead | None:
    """The gated head of an earlier trainer, to be taken off: it is the new one's `loss_type` that decides."""
    head = gated_head_of(model) if isinstance(model, nn.Module) else None
    if head is not None:
        # That trainer's mixed precision is a wrapper around the forward.
        extract_model_from_parallel(model, keep_fp32_wrapper=False)
    return head


def keep_ligers_other_kernels(args: Any, loss_type: str) -> None:
    """Switch Liger's cross-entropies off: what they are for, saving memory, the gated head does."""
    if args.use_liger_kernel:
        replaced = dict.fromkeys(("fused_linear_cross_entropy", "cross_entropy"), False)
        args.liger_kernel_config = {**(args.liger_kernel_config or {}), **replaced}
        logger.warning(
            "use_liger_kernel=True: loss_type=%r takes the place of Liger's fused cross-entropy, as sparing with "
            "memory; its other kernels are used.",
            loss_type,
        )
