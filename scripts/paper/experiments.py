"""What the paper sets: data, hyper-parameters, objectives, sampling, in one table.

From the paper, and from the commands and defaults of the authors' public repository (github.com/luludus/DEFT), of which
only such facts are here. `tests/scripts/test_paper_experiments.py` holds both trainers to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLAMA = "meta-llama/Llama-3.1-8B"
LEARNING_RATE = 5e-5
LLAMA_LEARNING_RATE = 2e-5

# Sequences of an optimizer step, over all ranks and micro-batches.
GLOBAL_BATCH_SIZE = 256
EPOCHS = 1
ADAM_BETAS = (0.9, 0.95)
# Of the steps, linear; then a cosine to 0.
WARMUP = 0.1
# Of the sum over micro-batches of micro-batch means.
CLIP = 1.0

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Experiment:
    """One of the three.

    Attributes:
        max_length: tokens of a sequence; what is longer is cut at its end.
        micro_batch_size: sequences of a forward pass on one rank.
        weight_decay: of AdamW.
        instruction: what every question ends with, in training and in the benchmarks.
        samples: answers to a question of the benchmarks.
        temperature: they are drawn at; 0 is greedy.
        max_new_tokens: most tokens of an answer.
    """

    max_length: int
    micro_batch_size: int
    weight_decay: float
    instruction: str
    samples: int
    temperature: float
    max_new_tokens: int


EXPERIMENTS = {
    "math": Experiment(
        max_length=3072,
        micro_batch_size=4,
        weight_decay=0.01,
        instruction=BOXED,
        samples=16,
        temperature=1.0,
        max_new_tokens=4096,
    ),
    "medical": Experiment(
        max_length=800,
        micro_batch_size=16,
        weight_decay=0.01,
        instruction=BOXED,
        samples=1,
        temperature=0.0,
        max_new_tokens=8000,
    ),
    "figfont": Experiment(
        max_length=800,
        micro_batch_size=16,
        weight_decay=1e-5,
        instruction="",
        samples=1,
        temperature=0.0,
        max_new_tokens=5,
    ),
}

# What `train.py` leaves in a finished model's folder.
EXPERIMENT_FILE = "experiment.json"

BASE = "base"
# The table's rows, in its order, as `loss_type` and `loss_kwargs`. "nll" goes by a name that has all metrics: alpha at
# a = 0 is nll. The floor of Cayley-Trans is a mean over the micro-batch there.
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "nll": ("alpha", {"a": 0.0}),
    "p": ("p", {}),
    "eaft": ("eaft", {}),
    "cayley_trans": ("cayley_trans", {"floor_coefficient": 0.5, "scope": "micro_batch"}),
    "deft": ("deft", {}),
}


def is_llama(model: str | None) -> bool:
    """Whether a base model is the one of the paper's headline, by its name on the hub or its folder's."""
    return model is not None and Path(model).name == Path(LLAMA).name


def peak(model: str) -> float:
    """The highest learning rate for a base model."""
    return LLAMA_LEARNING_RATE if is_llama(model) else LEARNING_RATE


def training_file(experiment: str) -> Path:
    """Where `prepare.py` writes an experiment's training data."""
    return Path("data") / experiment / "train.jsonl"


def accumulation(global_batch_size: int, micro_batch_size: int, ranks: int) -> int:
    """Micro-batches of a rank in an optimizer step.

    Raises:
        ValueError: the ranks cannot share the batch evenly.
    """
    count, rest = divmod(global_batch_size, micro_batch_size * ranks)
    if rest or not count:
        raise ValueError(
            f"{global_batch_size} sequences a step are not a multiple of {micro_batch_size} sequences a forward pass on "
            f"{ranks} ranks: take another number of ranks, or another --micro-batch-size."
        )
    return count


def max_grad_norm(micro_batches: int) -> float:
    """Where a gradient that is divided by the whole step's tokens is clipped as their sum of micro-batch means is."""
    return CLIP / micro_batches
