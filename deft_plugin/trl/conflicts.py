"""What cannot go together with an objective under TRL, refused before a model or a data set is touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..checks import check_rows
from ..conflicts import check_other_losses, check_parallelism, check_trainer
from ..head import causal_lm_of, check_model
from ..lora import targets_lm_head
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
    check_other_losses(args, arguments.get("compute_loss_func"), loss_type)
    instead = "Use it with TRL's own loss_type='nll', or use SFTTrainer."
    check_trainer(trainer_class, "SFTTrainer", instead, loss_type)
    if not isinstance(model, str):
        check_model(causal_lm_of(model))
    # On which TRL would raise a bare StopIteration.
    for name in ("train_dataset", "eval_dataset"):
        check_rows(name, arguments.get(name))


def find_conflicts(args: Any, peft_config: Any, loss_type: str) -> Iterator[str]:
    """What is wrong with the training arguments and the adapter's configuration alone, a sentence each."""
    for check in (
        lambda: check_other_losses(args, None, loss_type),
        lambda: check_parallelism(args, objective_of(args)),
        lambda: _check_lm_head_adapter(peft_config, loss_type),
    ):
        try:
            check()
        except ValueError as error:
            yield str(error)


def check_loss_type(args: Any, loss_type: str) -> None:
    """Raise `ValueError` where the arguments ask for another loss than the one that was installed."""
    if args.loss_type != loss_type:
        raise ValueError(
            f"args.loss_type was changed from {loss_type!r} to {args.loss_type!r} after the trainer "
            "was made, where it has no effect. Make a new trainer."
        )


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
