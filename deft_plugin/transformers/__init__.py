"""transformers.Trainer: `GatedTrainer(..., loss_type="deft")`, or `LogitsLoss` where logits are wanted."""

from typing import Any

from .logits_loss import LogitsLoss

__all__ = ["GatedTrainer", "LogitsLoss"]


def __getattr__(name: str) -> Any:
    # It needs accelerate and datasets, and LogitsLoss does not.
    if name != "GatedTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .trainer import GatedTrainer

    return GatedTrainer
