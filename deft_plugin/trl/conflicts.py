"""What cannot go together with an objective, refused before a model or a data set is touched."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sized
from types import CodeType
from typing import Any

from accelerate.parallelism_config import ParallelismConfig

from ..head import causal_lm_of, check_model
from ..lora import targets_lm_head
from ..parallelism import check_couples_no_parts
from .config import objective_of


def check_conflicts(trainer_class: type, arguments: dict[str, Any], loss_type: str) -> None:
    """Raise `ValueError` for a set-up in which the objective would not be what trains.

    Args:
        trainer_class: of the trainer that is being made.
        arguments: the trainer's arguments by name.
        loss_type: for the messages.
    """
    args, model = arguments["args"], arguments["model"]
    for conflict in find_conflicts(args, arguments.get("peft_config"), loss_type):
        raise ValueError(conflict)
    _check_other_losses(args, arguments.get("compute_loss_func"), loss_type)
    _check_trainer(trainer_class, loss_type)
    if not isinstance(model, str):
        check_model(causal_lm_of(model))
    for name in ("train_dataset", "eval_dataset"):
        _check_rows(name, arguments.get(name))


def _check_rows(name: str, dataset: Any) -> None:
    """Refuse a data set without rows, on which TRL would raise a bare StopIteration."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            _check_rows(f"{name}[{key!r}]", part)
    elif isinstance(dataset, Sized) and not len(dataset):
        raise ValueError(f"{name} has no rows.")


def find_conflicts(args: Any, peft_config: Any, loss_type: str) -> Iterator[str]:
    """What is wrong with the training arguments and the adapter's configuration alone, a sentence each."""
    for check in (
        lambda: _check_other_losses(args, None, loss_type),
        lambda: _check_parallelism(args),
        lambda: _check_lm_head_adapter(peft_config, loss_type),
    ):
        try:
            check()
        except ValueError as error:
            yield str(error)


def check_unchanged(trainer: Any, loss_type: str) -> None:
    """Raise `ValueError` where the trainer was told after its start to train something else."""
    if trainer.args.loss_type != loss_type:
        raise ValueError(
            f"args.loss_type was changed from {loss_type!r} to {trainer.args.loss_type!r} after the trainer "
            "was made, where it has no effect. Make a new trainer."
        )
    _check_other_losses(trainer.args, trainer.compute_loss_func, loss_type)
    if trainer.label_smoother is not None:
        raise ValueError(
            f"trainer.label_smoother would replace loss_type={loss_type!r}: set it to None."
        )


def _check_other_losses(args: Any, compute_loss_func: Any, loss_type: str) -> None:
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


def _check_parallelism(args: Any) -> None:
    """Refuse an objective that would couple the tokens of parts of sequences, where these are on several ranks."""
    parallelism = args.parallelism_config
    # What `accelerate launch` passes on; Accelerator reads the sizes from the environment too.
    if parallelism is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        parallelism = ParallelismConfig()
    objective = objective_of(args)
    for name in ("cp_size", "sp_size"):
        size = getattr(parallelism, name, None)
        if objective is not None and size is not None and size > 1:
            check_couples_no_parts(objective, f"parallelism_config.{name}={size}")


def _check_lm_head_adapter(peft_config: Any, loss_type: str) -> None:
    """Refuse what the gated head would refuse after the model is loaded and the data prepared."""
    excluded = targets_lm_head(getattr(peft_config, "exclude_modules", None))
    kind = str(getattr(peft_config, "peft_type", None)).rpartition(".")[2]
    if getattr(peft_config, "use_dora", False):
        kind = "DoRA"
    for field, supported in (
        ("target_modules", ("LORA", "TRAINABLE_TOKENS")),
        ("target_parameters", ()),
    ):
        targets = getattr(peft_config, field, None)
        if kind in supported or not targets_lm_head(targets):
            continue
        if not (excluded and field == "target_modules"):
            raise ValueError(
                f"peft_config.{field}={targets!r} puts {kind} on lm_head, and loss_type={loss_type!r} supports plain "
                f"LoRA by target_modules there. Use that, or remove lm_head from {field}; to train the head whole, "
                "put it into modules_to_save."
            )


def _check_trainer(trainer_class: type, loss_type: str) -> None:
    """Refuse a trainer that makes a loss of logits, as for distillation; others show at their first batch."""
    loss: Any = trainer_class.compute_loss  # type: ignore[attr-defined]
    names = set(_names_in(loss.__code__)) if hasattr(loss, "__code__") else set()
    if "logits" in names and not names & {"compute_loss", "loss", "log_probs", "token_loss"}:
        raise ValueError(
            f"{trainer_class.__name__} has a loss of its own, which would train in place of loss_type={loss_type!r}: "
            f"its compute_loss, of {loss.__module__}, takes the model's logits and neither calls SFTTrainer's "
            "compute_loss nor takes the model's loss. Use it with TRL's own loss_type='nll', or use SFTTrainer."
        )


def _names_in(code: CodeType) -> Iterator[str]:
    """The names and texts that a function's code has, with the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
        elif isinstance(constant, str):
            yield constant
