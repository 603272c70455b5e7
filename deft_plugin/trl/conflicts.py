"""What cannot go together with an objective, refused before a model or a data set is touched."""

from __future__ import annotations

import os
from collections.abc import Sized
from typing import Any

from accelerate.parallelism_config import ParallelismConfig

from ..head import causal_lm_of, check_model
from ..lora import targets_lm_head


def check_conflicts(arguments: dict[str, Any], loss_type: str, liger_is_whole: bool) -> None:
    """Raise `ValueError` for a set-up in which the objective would not be what trains.

    Args:
        arguments: the trainer's arguments by name.
        loss_type: for the messages.
        liger_is_whole: whether `use_liger_kernel` always brings the fused cross-entropy (TRL < 1.15).
    """
    args, model = arguments["args"], arguments["model"]
    check_settings(args, arguments.get("peft_config"), loss_type, liger_is_whole)
    _check_other_losses(args, arguments.get("compute_loss_func"), loss_type)
    if arguments.get("processing_class") is not None and hasattr(
        arguments["processing_class"], "image_processor"
    ):
        raise ValueError(
            f"loss_type={loss_type!r} supports text-only models, and the processing_class is a "
            f"{type(arguments['processing_class']).__name__}. Use loss_type='nll' for a vision-language model."
        )
    if isinstance(model, str):
        _check_text_only(model, args, loss_type)
    else:
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


def check_settings(args: Any, peft_config: Any, loss_type: str, liger_is_whole: bool) -> None:
    """What `check_conflicts` sees in the training arguments and the adapter's configuration alone."""
    _check_other_losses(args, None, loss_type)
    _check_parallelism(args, loss_type)
    liger = args.liger_kernel_config or {}
    if args.use_liger_kernel and (
        liger_is_whole or liger.get("fused_linear_cross_entropy") or liger.get("cross_entropy")
    ):
        raise ValueError(
            f"Liger's cross-entropy would replace loss_type={loss_type!r}, which has a fused head of its "
            "own. "
            + (
                "Set use_liger_kernel=False."
                if liger_is_whole
                else "Remove fused_linear_cross_entropy and cross_entropy from liger_kernel_config."
            )
        )
    _check_lm_head_adapter(peft_config, loss_type)


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


def _check_parallelism(args: Any, loss_type: str) -> None:
    """Refuse what splits a sequence over ranks; TRL trains the model's own loss under one form of it."""
    parallelism = args.parallelism_config
    # What `accelerate launch` passes on; Accelerator reads the sizes from the environment too.
    if parallelism is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        parallelism = ParallelismConfig()
    for name in ("cp_size", "sp_size"):
        size = getattr(parallelism, name, None)
        if size is not None and size > 1:
            raise ValueError(
                f"parallelism_config.{name}={size} splits sequences over ranks, which loss_type={loss_type!r} "
                f"does not support. Set {name}=1 and use data parallelism (DDP, FSDP, ZeRO), or train with "
                "loss_type='nll'."
            )


def _check_lm_head_adapter(peft_config: Any, loss_type: str) -> None:
    excluded = targets_lm_head(getattr(peft_config, "exclude_modules", None))
    for field in ("target_modules", "target_parameters"):
        targets = getattr(peft_config, field, None)
        if targets_lm_head(targets) and not (excluded and field == "target_modules"):
            raise ValueError(
                f"peft_config.{field}={targets!r} puts an adapter on lm_head, which loss_type={loss_type!r} "
                "does not support: the head's weight is used directly, so the adapter would not be trained. "
                f"Remove lm_head from {field}; to train the head, put it into modules_to_save."
            )


def _check_text_only(name: str, args: Any, loss_type: str) -> None:
    from transformers import AutoConfig

    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    trusted = options.get("trust_remote_code", getattr(args, "trust_remote_code", False))
    passed = {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}
    config = AutoConfig.from_pretrained(name, trust_remote_code=bool(trusted), **passed)
    if config.get_text_config() is not config:
        raise ValueError(
            f"model={name!r} is multi-modal, and loss_type={loss_type!r} supports text-only causal LMs. "
            "Use TRL's own loss_type='nll', or load the language model alone."
        )
