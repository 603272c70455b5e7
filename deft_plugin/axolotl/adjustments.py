"""What of an Axolotl YAML is set to something else, and said in one line each.

Other cross-entropies are there to save memory or time, as the gated head is: it takes their place. What would train
another objective is refused instead, in `conflicts`.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from axolotl.integrations.config import merge_input_args
from pydantic import TypeAdapter, ValidationError

TOKEN_SCALING = "liger_use_token_scaling"
DEFAULT_OBJECTIVE = "deft"
CROSS_ENTROPIES = (
    "cut_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_cross_entropy",
    "chunked_cross_entropy",
    "flash_attn_cross_entropy",
)
_LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


def adjust(cfg: MutableMapping[str, Any]) -> Iterator[str]:
    """Change a raw YAML, before it is validated and when all its plugins are loaded; sentences on what was changed."""
    _write_off_as_false(cfg)
    yield from _switch_off_cross_entropies(cfg)
    yield from _switch_off_perplexity(cfg)
    yield from _switch_off_lora_kernels(cfg)


def is_on(value: Any) -> bool:
    """Whether Axolotl's schema takes a value for true, also as a text; what it refuses is not."""
    return _as_bool(value) is True


def is_set(value: Any) -> bool:
    """Whether a value is anything but false, 0, empty or missing, or a text that Axolotl's schema takes for these."""
    try:
        return bool(TypeAdapter(bool | float | None).validate_python(value))
    except ValidationError:
        return bool(value)


def _as_bool(value: Any) -> bool | None:
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return None  # Axolotl's schema refuses it.


def _write_off_as_false(cfg: MutableMapping[str, Any]) -> None:
    # Axolotl's checks take the text "false" for true, and would then load a model without a language-model head.
    for key in ("reward_model", "process_reward_model"):
        if key in cfg and not is_set(cfg[key]):
            cfg[key] = False


def _switch_off_cross_entropies(cfg: MutableMapping[str, Any]) -> Iterator[str]:
    keys = list(CROSS_ENTROPIES)
    if is_on(cfg.get(TOKEN_SCALING)):
        # A loss of its own, for which Liger wants its fused cross-entropy; refused with another objective.
        if cfg.get("deft_objective", DEFAULT_OBJECTIVE) == "dft":
            keys.append(TOKEN_SCALING)
        else:
            keys.remove("liger_fused_linear_cross_entropy")
    # A plugin's keys are in the schema when it is listed, some with true for their default.
    fields = merge_input_args()[0].model_fields
    on = [key for key in keys if key in fields and is_on(cfg.get(key, fields[key].default))]
    # Axolotl takes the text "false" for true in some of its checks, and also keys whose plugins are not listed.
    given = [key for key in keys if _as_bool(cfg.get(key)) is not None]
    cfg.update(dict.fromkeys([*on, *given], False))
    if on:
        liger = " Liger's other kernels stay." if any("liger" in key for key in on) else ""
        yield (
            f"{', '.join(on)} set to false: the gated head takes the place of other cross-entropies, and builds no "
            f"logits either.{liger}"
        )


def _switch_off_perplexity(cfg: MutableMapping[str, Any]) -> Iterator[str]:
    metrics = cfg.get("eval_causal_lm_metrics")
    if (
        is_on(cfg.get("do_causal_lm_eval"))
        and isinstance(metrics, list)
        and "perplexity" in metrics
    ):
        others = [metric for metric in metrics if metric != "perplexity"]
        # An empty list means Axolotl's four defaults.
        cfg.update({"eval_causal_lm_metrics": others} if others else {"do_causal_lm_eval": False})
        yield (
            "perplexity left out of eval_causal_lm_metrics, where it would be exp(the objective): eval_perplexity is in "
            "the log."
        )


def _switch_off_lora_kernels(cfg: MutableMapping[str, Any]) -> Iterator[str]:
    if (
        cfg.get("adapter") in ("lora", "qlora")
        and not torch.accelerator.is_available()
        and all(cfg.get(name) is None for name in _LORA_KERNELS)
    ):
        cfg.update(dict.fromkeys(_LORA_KERNELS, False))
        yield "lora_*_kernel set to false: Axolotl's LoRA kernels need an accelerator."
