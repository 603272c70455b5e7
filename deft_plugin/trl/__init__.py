"""TRL: `loss_type="deft"` in SFTConfig and SFTTrainer."""

from .config import SFTConfig
from .trainer import SFTTrainer, register, unregister

__all__ = ["SFTConfig", "SFTTrainer", "register", "unregister"]
