"""Objectives: pure functions of per-token statistics. This package knows torch and nothing else."""

from . import family
from .base import FocusObjective, Objective, WeightedObjective, deformed_log_loss, power_gate
from .registry import build_objective, objective, objective_names
from .registry import register as register_objective
from .statistics import MissingStatisticError, TokenStatistics

__all__ = [
    "FocusObjective",
    "MissingStatisticError",
    "Objective",
    "TokenStatistics",
    "WeightedObjective",
    "build_objective",
    "deformed_log_loss",
    "family",
    "objective",
    "objective_names",
    "power_gate",
    "register_objective",
]
