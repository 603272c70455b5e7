"""The fused projection core. Knows the objectives' statistics; knows no model and no trainer."""

from .linear import PATHS, linear_gated_loss
from .logits import gated_loss
from .output import GatedLoss

__all__ = ["PATHS", "GatedLoss", "gated_loss", "linear_gated_loss"]
