"""The fused projection core. Knows the objectives' statistics; knows no model and no trainer."""

from .linear import linear_gated_loss
from .logits import gated_loss
from .output import GatedLoss
from .settings import PATHS, CoreSettings, split_settings
from .targets import CountedTargets

__all__ = [
    "PATHS",
    "CoreSettings",
    "CountedTargets",
    "GatedLoss",
    "gated_loss",
    "linear_gated_loss",
    "split_settings",
]
