"""DEFT and Cayley-Trans (arXiv 2602.11424) for fine-tuning language models.

deft_plugin.register()                          # TRL: SFTConfig(loss_type="deft")
from deft_plugin.trl import SFTConfig, SFTTrainer    # the same without touching TRL's classes

GatedTrainer(model, args, loss_type="deft")     # transformers.Trainer with a gated head
add_gated_head(model, "deft")                   # any Hugging Face causal LM
linear_gated_loss(hidden, weight, targets)      # the loss itself, without logits
gated_loss(logits, targets)                     # the loss of logits you have
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .head import (
        GatedCausalLMOutput,
        GatedHead,
        add_gated_head,
        gated_head_of,
        keep_cpu_weights_unpacked,
    )
    from .objectives import (
        FocusObjective,
        Objective,
        TokenStatistics,
        WeightedObjective,
        build_objective,
        deformed_log_loss,
        objective,
        objective_names,
        register_objective,
    )
    from .ops import CountedTargets, GatedLoss, gated_loss, linear_gated_loss
    from .transformers import GatedTrainer, LogitsLoss
    from .trl import register, unregister

__version__ = "0.1.0"

__all__ = [
    "CountedTargets",
    "FocusObjective",
    "GatedCausalLMOutput",
    "GatedHead",
    "GatedLoss",
    "GatedTrainer",
    "LogitsLoss",
    "Objective",
    "TokenStatistics",
    "WeightedObjective",
    "add_gated_head",
    "build_objective",
    "deformed_log_loss",
    "gated_head_of",
    "gated_loss",
    "keep_cpu_weights_unpacked",
    "linear_gated_loss",
    "objective",
    "objective_names",
    "register",
    "register_objective",
    "unregister",
]

# Imported on first use: the command `deft` answers without torch, and the objectives and the core need torch alone.
_LAZY = {
    "CountedTargets": "ops",
    "FocusObjective": "objectives",
    "GatedCausalLMOutput": "head",
    "GatedHead": "head",
    "GatedLoss": "ops",
    "GatedTrainer": "transformers",
    "LogitsLoss": "transformers",
    "Objective": "objectives",
    "TokenStatistics": "objectives",
    "WeightedObjective": "objectives",
    "add_gated_head": "head",
    "build_objective": "objectives",
    "deformed_log_loss": "objectives",
    "gated_head_of": "head",
    "gated_loss": "ops",
    "keep_cpu_weights_unpacked": "head",
    "linear_gated_loss": "ops",
    "objective": "objectives",
    "objective_names": "objectives",
    "register": "trl",
    "register_objective": "objectives",
    "unregister": "trl",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
