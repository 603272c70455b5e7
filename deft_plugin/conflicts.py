"""What would train something else than the objective, in any of transformers' trainers: refused before data is touched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import CodeType
from typing import Any

from accelerate.parallelism_config import ParallelismConfig

from .objectives import Objective
from .parallelism import check_couples_no_parts


def check_other_losses(args: Any, compute_loss_func: Any, loss_type: str) -> None:
    """Raise `ValueError` for another loss among training arguments and the trainer's own.

    Args:
        args: the training arguments.
        compute_loss_func: the trainer's argument of that name.
        loss_type: the objective's name, for the message.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} cannot be combined with "
            f"loss_type={loss_type!r}, which defines its own gradient on every token. Set it to 0."
        )
    if compute_loss_func is not None:
        raise ValueError(
            f"compute_loss_func would replace loss_type={loss_type!r}. Leave one of them out; a loss of "
            "your own can be an objective: see deft_plugin.objective."
        )


def check_unchanged(trainer: Any, loss_type: str) -> None:
    """Raise `ValueError` where the trainer was told after its start to train something else."""
    check_other_losses(trainer.args, trainer.compute_loss_func, loss_type)
    if trainer.label_smoother is not None:
        raise ValueError(
            f"trainer.label_smoother would replace loss_type={loss_type!r}: set it to None."
        )


def check_parallelism(args: Any, objective: Objective | None) -> None:
    """Raise `ValueError` where several ranks would have another step than one, or couple the tokens of parts of sequences."""
    if objective is not None and args.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices=False divides by each rank's own tokens, so that a step depends on which rank has "
            "which rows. Leave it out: it is true by default."
        )
    parallelism = args.parallelism_config
    # What `accelerate launch` passes on; Accelerator reads the sizes from the environment too.
    if parallelism is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        parallelism = ParallelismConfig()
    for name in ("cp_size", "sp_size"):
        size = getattr(parallelism, name, None)
        if objective is not None and size is not None and size > 1:
            check_couples_no_parts(objective, f"parallelism_config.{name}={size}")


def check_trainer(trainer_class: type, base: str, instead: str, loss_type: str) -> None:
    """Raise `ValueError` for a trainer that makes a loss of logits, as for distillation.

    Others show at their first batch.

    Args:
        trainer_class: of the trainer that is being made.
        base: name of the class whose compute_loss it is to call.
        instead: what to do, a sentence.
        loss_type: the objective's name, for the message.
    """
    loss: Any = trainer_class.compute_loss  # type: ignore[attr-defined]
    names = set(_names_in(loss.__code__)) if hasattr(loss, "__code__") else set()
    if "logits" in names and not names & {"compute_loss", "loss", "log_probs", "token_loss"}:
        raise ValueError(
            f"{trainer_class.__name__} has a loss of its own, which would train in place of loss_type={loss_type!r}: "
            f"its compute_loss, of {loss.__module__}, takes the model's logits and neither calls {base}'s "
            f"compute_loss nor takes the model's loss. {instead}"
        )


def _names_in(code: CodeType) -> Iterator[str]:
    """The names and texts that a function's code has, with the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
        elif isinstance(constant, str):
            yield constant
