"""Keys of an Axolotl YAML under which the objective would not be what trains, each with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..lora import targets_lm_head

_OTHER_LOSSES = {
    "liger_fused_linear_cross_entropy": "Remove it: the gated head is fused already, and Liger's other "
    "kernels (liger_rope, liger_rms_norm, ...) can stay.",
    "liger_cross_entropy": "Remove it: the gated head builds no logits that it could be applied to.",
    "liger_use_token_scaling": "Remove it, and set `deft_objective: dft` for its loss.",
    "cut_cross_entropy": "Set `cut_cross_entropy: false`, or remove CutCrossEntropyPlugin: the gated head "
    "builds no logits either.",
    "chunked_cross_entropy": "Remove it: the gated head works in tiles already.",
    "use_eaft": "Remove it, and set `deft_objective: eaft`.",
    "eaft_alpha": "Set `deft_objective: eaft` and `deft: {exponent: ...}`.",
    "eaft_k": "Set `deft_objective: eaft` and `deft: {k: ...}`.",
    "label_smoothing_factor": "Remove it: an objective defines its own gradient on every token.",
    "rl": "The objectives are for supervised fine-tuning: remove `rl`, or the plugin.",
    "orpo_alpha": "The objectives are for supervised fine-tuning: remove it, or the plugin.",
    "reward_model": "A reward model has no language-model head: remove it, or the plugin.",
    "process_reward_model": "A reward model has no language-model head: remove it, or the plugin.",
    "num_labels": "A classifier has no language-model head: remove it, or the plugin.",
    "kd_trainer": "Distillation has a loss of its own: remove it, or the plugin.",
    "trainer_cls": "The plugin brings its own trainer: remove it, or the plugin.",
    "qat": "The gated head uses the lm_head's weight directly, without its fake quantisation: remove it, or "
    "the plugin.",
}
_SPLIT_MODELS = {
    "context_parallel_size": "tokens of a sequence would be on several ranks",
    "sequence_parallel_degree": "tokens of a sequence would be on several ranks",
    "tensor_parallel_size": "not tested under Axolotl",
    "expert_parallel_size": "not tested",
}


def find_conflicts(data: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a raw YAML, one sentence each: the key, its value, what to do instead."""
    for key, instead in _OTHER_LOSSES.items():
        if data.get(key):
            yield f"`{key}: {_shown(data[key])}` would replace the objective. {instead}"
    # The key's default is true where its plugin is listed.
    if "cut_cross_entropy" not in data and any(
        str(name).endswith("CutCrossEntropyPlugin") for name in data.get("plugins") or ()
    ):
        yield f"CutCrossEntropyPlugin would replace the objective. {_OTHER_LOSSES['cut_cross_entropy']}"
    for key in ("type_of_model", "model_type"):
        if "Classification" in str(data.get(key)):
            yield f"`{key}: {data[key]}` has no language-model head. Remove it, or the plugin."
    for key, reason in _SPLIT_MODELS.items():
        if _greater_than_one(data.get(key)):
            yield (
                f"`{key}: {data[key]}` is not supported: {reason}. Set it to 1; DDP, FSDP2, ZeRO and gradient "
                "checkpointing work."
            )
    for key in ("lora_target_modules", "lora_target_parameters"):
        if targets_lm_head(data.get(key)):
            yield (
                f"`{key}: {data[key]}` puts an adapter on lm_head, whose weight is used directly, so that "
                "the adapter would not be trained. Remove lm_head from it; to train the head, set "
                "`lora_modules_to_save: [lm_head]`."
            )


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _greater_than_one(value: Any) -> bool:
    try:
        return value is not None and float(value) > 1
    except (TypeError, ValueError):
        return False  # Axolotl's own schema names the wrong type.
