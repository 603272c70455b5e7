"""What cannot go together with an objective, refused before a model or a data set is touched."""

from __future__ import annotations

from typing import Any

from ..head import causal_lm_of, check_model
from ..lora import targets_lm_head


def check_conflicts(arguments: dict[str, Any], loss_type: str, liger_is_whole: bool) -> None:
    """Raise `ValueError` for a set-up in which the objective would not be what trains.

    Args:
        arguments: the trainer's arguments by name.
        loss_type: for the messages.
        liger_is_whole: whether `use_liger_kernel` always brings the fused cross-entropy (TRL < 1.15).
    """
    args = arguments["args"]
    model = arguments["model"]
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} cannot be combined with "
            f"loss_type={loss_type!r}, which defines its own gradient on every token. Set it to 0."
        )
    if arguments.get("compute_loss_func") is not None:
        raise ValueError(
            f"compute_loss_func would replace loss_type={loss_type!r}. Leave one of them out; a loss of "
            "your own can be an objective: see deft_plugin.objective."
        )
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
    _check_lm_head_adapter(arguments.get("peft_config"), loss_type)
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


def _check_lm_head_adapter(peft_config: Any, loss_type: str) -> None:
    targets = getattr(peft_config, "target_modules", None)
    if targets_lm_head(targets):
        raise ValueError(
            f"peft_config.target_modules={targets!r} puts an adapter on lm_head, which "
            f"loss_type={loss_type!r} does not support: the head's weight is used directly, so the adapter "
            "would not be trained. Remove lm_head from target_modules; to train the head, put it into "
            "modules_to_save."
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
