"""Sequences in parts on several ranks: what of a step's loss has to be done so that it is that of one process.

A token is scored where its label stands, and a step's loss is a sum over tokens divided by their number on all ranks. So
it does not matter which rank has which tokens, as long as labels are shifted before a sequence is cut
(`shift_labels`), the count is that of the whole step, and averaging over ranks is undone. transformers' Trainer sees to
that under accelerate's context parallelism. Under DeepSpeed's sequence parallelism (Ulysses) it takes a mean of
micro-batches' means, which `step_loss` replaces. Axolotl's ring attention is in `axolotl.ring_attention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor, distributed

from .head.substitution import attribute_of
from .objectives import Objective
from .objectives.family import CayleyTrans


def check_couples_no_parts(objective: Objective, setting: str) -> None:
    """Raise `ValueError` for an objective that couples the tokens of a forward pass, where these are of parts of sequences.

    One whose coupling is a scope that trainers provide for is not refused.

    Args:
        objective: as it is configured.
        setting: what cuts the sequences, for the message.
    """
    if objective.couples_tokens and objective.step_scope is None:
        instead = (
            "Set scope to 'ema' or 'global', which do not depend on how a step is split"
            if isinstance(objective, CayleyTrans)
            else "Use an objective that couples no tokens"
        )
        raise ValueError(
            f"{setting} puts parts of a sequence on several ranks, and {objective!r} couples the tokens of one forward "
            f"pass, which would be those of one rank's parts. {instead}, or set it to 1."
        )


def splits_sequences(trainer: Any) -> bool:
    """Whether a rank has parts of sequences in training."""
    parallelism = _parallelism_of(trainer)
    return parallelism is not None and max(parallelism.cp_size, parallelism.sp_size) > 1


def ranks_of_a_token(trainer: Any, of_parts: bool) -> int:
    """How many ranks score each token: those that share its matrices, or its sequence where each has the whole.

    Args:
        trainer: transformers'.
        of_parts: whether a rank's forward passes are of parts of sequences.
    """
    size: int = trainer.get_tp_size()
    return size if of_parts else size * trainer.get_cp_size()


def check_loader(trainer: Any) -> None:
    """Raise `ValueError` where ranks that share a sequence are not given the same rows to cut."""
    parallelism = _parallelism_of(trainer)
    dispatches = isinstance(trainer.callback_handler.train_dataloader, DataLoaderDispatcher)
    if parallelism is not None and parallelism.cp_size > 1 and dispatches:
        raise ValueError(
            f"dispatch_batches=True gives every rank rows of its own, and with context parallelism {parallelism.cp_size} "
            "ranks share a row. Set accelerator_config={'dispatch_batches': False}."
        )


def check_lengths(trainer: Any, batches: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ValueError` for a batch that accelerate's context parallelism would cut into unequal parts."""
    size: int = trainer.get_cp_size()
    lengths = [batch["input_ids"].size(1) for batch in batches] if size > 1 else []
    for length in lengths:
        # Each rank has one part of a sequence's first half and one of its second, which makes their work equal.
        if length % (2 * size):
            raise ValueError(
                f"A batch has sequences of {length:,} tokens, which cp_size={size} cannot cut into {2 * size} equal parts. "
                f"Set pad_to_multiple_of={2 * size}."
            )


def count_tokens_of_step(
    trainer: Any, batches: Sequence[Mapping[str, Any]], num_items_in_batch: Tensor | int | None
) -> Tensor | int | None:
    """Number of scored tokens of an optimizer step on all ranks; `num_items_in_batch` where that is it. Collective.

    transformers' Trainer counts none under Ulysses, whose batches have `shift_labels` alone.
    """
    if _ulysses_size(trainer) == 1 or not batches:
        return num_items_in_batch
    counts = [batch["shift_labels"].ne(-100).sum() for batch in batches]
    total = torch.stack(counts).sum().to(trainer.args.device)
    distributed.all_reduce(total)
    return total


def scoring_parts(
    trainer: Any, num_items_in_batch: Tensor | int | None
) -> AbstractContextManager[None]:
    """A context in which the trainer's own `compute_loss` gives the loss over the whole optimizer step under Ulysses.

    In training, transformers' Trainer gives a mean of micro-batches' means there. Its gradient is as many times too
    large as ranks share a sequence under ZeRO-0 to 2, being summed over these ranks once more by DeepSpeed.
    """
    size = _ulysses_size(trainer)
    if size == 1 or num_items_in_batch is None:
        return nullcontext()

    def compute_loss(
        accelerator: Any, model: Any, inputs: dict[str, Any], return_outputs: bool, *_: Any
    ) -> Any:
        summed = _summed_ranks(model, size)
        outputs = model(**inputs)
        loss = _step_loss(trainer, outputs, num_items_in_batch) / summed
        # The log has the mean over all ranks.
        loss = loss + (summed - 1) * loss.detach()
        return (loss, outputs) if return_outputs else loss

    return attribute_of(transformers.trainer, "deepspeed_sp_compute_loss", compute_loss)


def _summed_ranks(engine: Any, size: int) -> int:
    """Over how many ranks DeepSpeed sums gradients that it averages over the others: those that share a sequence.

    Under ZeRO-3 it averages over all, but for the gradients that lie in a contiguous buffer where they are not
    reduce-scattered.

    Raises:
        ValueError: gradients of some parameters would be averaged, of others summed.
    """
    if engine.zero_optimization_stage() < 3:
        return size
    if engine.zero_contiguous_gradients() and not engine.zero_reduce_scatter():
        raise ValueError(
            f"DeepSpeed's ZeRO-3 with sp_size={size} and reduce_scatter=false sums some parameters' gradients over the "
            "ranks that share a sequence and averages others'. Set zero_optimization.reduce_scatter to true."
        )
    return 1


def _step_loss(trainer: Any, outputs: Any, num_items_in_batch: Tensor | int) -> Tensor:
    """A micro-batch's loss () on this rank, whose mean over ranks, summed over micro-batches, is the step's.

    `outputs` are of a gated forward without `num_items_in_batch`.
    """
    tokens = outputs.token_loss.sum()
    count = torch.as_tensor(num_items_in_batch, device=tokens.device).clamp(min=1)
    loss = tokens * trainer.accelerator.num_processes / count
    if outputs.aux_loss is not None:
        # A mixture's auxiliary loss is a mean over micro-batches.
        auxiliary = outputs.loss - tokens / outputs.label_mask.sum().clamp(min=1)
        loss = loss + auxiliary / trainer.current_gradient_accumulation_steps
    return loss


def parts_of(
    trainer: Any, model: Any, batch: Mapping[str, Any]
) -> tuple[AbstractContextManager[Any], dict[str, Any]]:
    """A context and inputs in it for a forward pass beside training, by which `batch` stays whole.

    accelerate's context parallelism cuts a batch's tensors in place.
    """
    inputs = dict(batch)
    if trainer.get_cp_size() > 1:
        inputs = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
    context, inputs = trainer._prepare_context_parallel_inputs(model, inputs)
    return context(), inputs


def _ulysses_size(trainer: Any) -> int:
    parallelism = _parallelism_of(trainer)
    if parallelism is None or parallelism.sp_backend != "deepspeed":
        return 1
    size: int = parallelism.sp_size
    return size


def _parallelism_of(trainer: Any) -> Any:
    return getattr(trainer.accelerator, "parallelism_config", None)
