"""Keys of an Axolotl YAML under which another objective would be trained, each with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..lora import targets_lm_head
from .adjustments import DEFAULT_OBJECTIVE, TOKEN_SCALING, is_on, is_set

_SUPERVISED = "The objectives are for supervised fine-tuning of a language model"
_OTHER_OBJECTIVES = {
    "rl": f"{_SUPERVISED}: remove `rl`, or the plugin.",
    "reward_model": f"{_SUPERVISED}: remove it, or the plugin.",
    "process_reward_model": f"{_SUPERVISED}: remove it, or the plugin.",
    "kd_trainer": "Distillation has a loss of its own: remove it, or the plugin.",
    "trainer_cls": "The plugin brings its own trainer: remove it, or the plugin.",
    "label_smoothing_factor": "An objective defines its own gradient on every token (and Axolotl ignores the key): "
    "remove it.",
}


def find_conflicts(data: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a raw YAML, one sentence each: the key, its value, what to do instead."""
    for key, instead in _OTHER_OBJECTIVES.items():
        if is_set(data.get(key)):
            yield f"`{key}: {_shown(data[key])}` would train another objective. {instead}"
    yield from _find_weighted_cross_entropies(data)
    for key in ("type_of_model", "model_type"):
        if "Classification" in str(data.get(key)):
            yield f"`{key}: {data[key]}` has no language-model head. Remove it, or the plugin."
    yield from _find_lm_head_adapters(data)


def _find_weighted_cross_entropies(data: Mapping[str, Any]) -> Iterator[str]:
    if is_on(data.get("use_eaft")):
        k, alpha = data.get("eaft_k") or 20, data.get("eaft_alpha")
        yield (
            "`use_eaft: true` would train another objective. Remove it, and set `deft_objective: eaft`; with "
            f"`deft: {{k: {k}, exponent: {1.0 if alpha is None else alpha}, normalizer: 1.0}}` it is Axolotl's."
        )
    if is_on(data.get(TOKEN_SCALING)) and data.get("deft_objective", DEFAULT_OBJECTIVE) != "dft":
        yield (
            f"`{TOKEN_SCALING}: true` would train another objective. Remove it, or set `deft_objective: dft`, which "
            "is its loss."
        )


def _find_lm_head_adapters(data: Mapping[str, Any]) -> Iterator[str]:
    instead = (
        "Remove lm_head from it; to train the head whole, set `lora_modules_to_save: [lm_head]`."
    )
    if is_on(data.get("peft_use_dora")) and targets_lm_head(data.get("lora_target_modules")):
        yield (
            "`peft_use_dora: true` and lm_head in `lora_target_modules`: with DoRA the logits are not linear in the "
            f"hidden states with one weight and one low-rank addition. {instead}"
        )
    if targets_lm_head(data.get("lora_target_parameters")):
        yield (
            f"`lora_target_parameters: {data['lora_target_parameters']}` puts an adapter on lm_head's parameter, "
            f"which the gated head does not know. {instead} `lora_target_modules: [lm_head]` works too."
        )


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
