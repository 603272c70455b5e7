"""TRL: `loss_type="deft"` in SFTConfig and SFTTrainer."""

from .config import SFTConfig
from .registration import register, unregister
from .trainer import SFTTrainer

__all__ = ["SFTConfig", "SFTTrainer", "register", "unregister"]
