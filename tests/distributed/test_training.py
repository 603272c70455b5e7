"""Two and four processes train as one does: the same parameters after four steps, for every objective."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

import pytest

from deft_plugin import objective_names

from .ranks import run_ranks
from .steps import OneProcess, Parameters, Run, assert_same_parameters, train, train_all

# Objectives that couple no tokens: what one process computes does not depend on the micro-batches.
OBJECTIVES = [
    Run("deft"),
    Run("cayley"),
    Run("cayley_trans", {"scope": "fixed", "mean_probability": 0.3}),
    Run("alpha", {"a": 0.3}),
    Run("p"),
    Run("eaft"),
    Run("eaft", {"entropy": "full"}),
    Run("nll"),
    Run("dft"),
]
MODELS = [Run("deft", model=model) for model in ("tied", "lora", "lora-head")]
WEIGHTED = Run("deft", weighted=True)
NEEDS_DEEPSPEED = pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed not installed")
KINDS_OF_TEST = [
    "ddp",
    "fsdp2",
    pytest.param("zero1", marks=NEEDS_DEEPSPEED),
    pytest.param("zero2", marks=NEEDS_DEEPSPEED),
    pytest.param("zero3", marks=[NEEDS_DEEPSPEED, pytest.mark.slow]),
]


def test_every_objective_is_here() -> None:
    assert {run.objective for run in OBJECTIVES} == set(objective_names())


@functools.cache
def reference(run: Run) -> Parameters:
    return train(run, OneProcess)


def compare(runs: list[Run], kind: str, directory: Path, world_size: int) -> None:
    ranks = run_ranks(train_all(runs, kind, world_size), directory, world_size)
    for index, run in enumerate(runs):
        for parameters in ranks:
            assert_same_parameters(parameters[index], reference(run), run)


@pytest.mark.parametrize("kind", KINDS_OF_TEST)
def test_two_processes_have_the_parameters_of_one(kind: str, tmp_path: Path) -> None:
    compare([*OBJECTIVES, *MODELS, WEIGHTED], kind, tmp_path, world_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_OF_TEST)
def test_four_processes_have_the_parameters_of_one(kind: str, tmp_path: Path) -> None:
    # Every pair of objective, kind and number of ranks, not every three.
    objectives = OBJECTIVES if kind == "ddp" else [Run("deft")]
    compare([*objectives, *MODELS], kind, tmp_path, world_size=4)
