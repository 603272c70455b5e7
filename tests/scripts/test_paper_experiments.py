"""The paper's hyper-parameters: both trainers, the YAMLs and the table are held to one place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deft_plugin.objectives import build_objective

pytest.importorskip("typer", reason="needs the extra `paper`")
from paper.experiments import (
    ADAM_BETAS,
    BASE,
    CLIP,
    EPOCHS,
    EXPERIMENTS,
    GLOBAL_BATCH_SIZE,
    LLAMA,
    OBJECTIVES,
    WARMUP,
    accumulation,
    max_grad_norm,
    peak,
    training_file,
)
from paper.summary import FIGURES
from paper.table import NAMES, PUBLISHED
from paper.train import trl_arguments

from deft_plugin.trl import SFTConfig

ROOT = Path(__file__).parents[2]
RANKS = 8
YAMLS = [
    (experiment, objective) for experiment in EXPERIMENTS for objective in ("deft", "cayley_trans")
]


def axolotl(experiment: str, objective: str) -> dict[str, Any]:
    path = ROOT / "axolotl_configs" / f"paper-{experiment}-{objective}.yaml"
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def test_the_table_is_what_the_paper_and_its_public_commands_say() -> None:
    assert (GLOBAL_BATCH_SIZE, EPOCHS, ADAM_BETAS, WARMUP, CLIP) == (256, 1, (0.9, 0.95), 0.1, 1.0)
    assert [e.max_length for e in EXPERIMENTS.values()] == [3072, 800, 800]
    assert [e.micro_batch_size for e in EXPERIMENTS.values()] == [4, 16, 16]
    assert [e.weight_decay for e in EXPERIMENTS.values()] == [0.01, 0.01, 1e-5]
    assert [e.samples for e in EXPERIMENTS.values()] == [16, 1, 1]
    assert [e.temperature for e in EXPERIMENTS.values()] == [1.0, 0.0, 0.0]
    assert [peak(name) for name in (LLAMA, "/models/Llama-3.1-8B", "Qwen/Qwen2.5-7B")] == [
        *(2e-5, 2e-5, 5e-5)
    ]


@pytest.mark.parametrize(("experiment", "objective"), YAMLS)
def test_axolotls_yaml_is_the_table(experiment: str, objective: str) -> None:
    values, table = axolotl(experiment, objective), EXPERIMENTS[experiment]
    micro_batches = accumulation(GLOBAL_BATCH_SIZE, table.micro_batch_size, RANKS)
    expected = {
        "base_model": LLAMA,
        "deft_objective": objective,
        "sequence_len": table.max_length,
        "sample_packing": False,
        "micro_batch_size": table.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "num_epochs": EPOCHS,
        "learning_rate": peak(LLAMA),
        "lr_scheduler": "cosine",
        "warmup_ratio": WARMUP,
        "adam_beta1": ADAM_BETAS[0],
        "adam_beta2": ADAM_BETAS[1],
        "weight_decay": table.weight_decay,
        "max_grad_norm": max_grad_norm(micro_batches),
        "bf16": True,
    }
    assert {key: values[key] for key in expected} == expected
    assert values.get("deft", {}) == OBJECTIVES[objective][1]
    assert [dataset["path"] for dataset in values["datasets"]] == [str(training_file(experiment))]


@pytest.mark.parametrize(("experiment", "objective"), YAMLS)
def test_both_trainers_are_told_the_same(experiment: str, objective: str) -> None:
    values = axolotl(experiment, objective)
    arguments = trl_arguments(EXPERIMENTS[experiment], objective, LLAMA, RANKS)
    same = {
        "per_device_train_batch_size": "micro_batch_size",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "num_train_epochs": "num_epochs",
        "learning_rate": "learning_rate",
        "lr_scheduler_type": "lr_scheduler",
        "warmup_steps": "warmup_ratio",
        "optim": "optimizer",
        "adam_beta1": "adam_beta1",
        "adam_beta2": "adam_beta2",
        "weight_decay": "weight_decay",
        "max_grad_norm": "max_grad_norm",
        "max_length": "sequence_len",
        "packing": "sample_packing",
        "loss_type": "deft_objective",
    }
    assert {name: arguments[name] for name in same} == {
        name: values[key] for name, key in same.items()
    }
    assert arguments.keys() == same.keys() | {"loss_kwargs"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trl_takes_the_arguments_and_warms_up_over_a_tenth(objective: str, tmp_path: Path) -> None:
    arguments = trl_arguments(EXPERIMENTS["figfont"], objective, LLAMA, ranks=1)
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **arguments)
    assert args.get_warmup_steps(156) == 16
    loss_type, loss_kwargs = OBJECTIVES[objective]
    build_objective(loss_type, loss_kwargs)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 64), (2, 32), (8, 8), (64, 1)])
def test_a_step_has_256_sequences_on_any_number_of_ranks(ranks: int, micro_batches: int) -> None:
    arguments = trl_arguments(EXPERIMENTS["math"], "deft", LLAMA, ranks)
    assert arguments["gradient_accumulation_steps"] == micro_batches
    assert arguments["max_grad_norm"] == 1 / micro_batches


@pytest.mark.parametrize("ranks", [3, 128])
def test_ranks_that_cannot_share_the_batch_are_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match=rf"256 sequences .* 4 sequences .* {ranks} ranks"):
        trl_arguments(EXPERIMENTS["math"], "deft", LLAMA, ranks)


@pytest.mark.parametrize("size", [0.5, 3.0, 40.0])
def test_the_clipping_has_the_direction_and_share_of_the_authors(size: float) -> None:
    """Theirs is the sum of m micro-batch means at 1; for micro-batches of equal tokens it is m times ours."""
    micro_batches = 8
    theirs = torch.nn.Parameter(torch.zeros(5))
    ours = torch.nn.Parameter(torch.zeros(5))
    theirs.grad = torch.arange(1.0, 6.0) * size
    ours.grad = theirs.grad / micro_batches
    torch.nn.utils.clip_grad_norm_([theirs], CLIP)
    torch.nn.utils.clip_grad_norm_([ours], max_grad_norm(micro_batches))
    torch.testing.assert_close(ours.grad * micro_batches, theirs.grad)


def test_the_papers_figures_are_those_of_the_readme() -> None:
    assert list(NAMES) == [BASE, *OBJECTIVES]
    rows = re.findall(
        r"^\| (mathematics|medicine|FigFont).*$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(rows) == len(PUBLISHED) == len(FIGURES)
    for line, figures in zip(
        re.findall(
            r"^\| (?:mathematics|medicine|FigFont).*$", (ROOT / "README.md").read_text(), re.M
        ),
        PUBLISHED.values(),
        strict=True,
    ):
        numbers = [float(cell.strip(" *")) for cell in line.strip("|").split("|")[1:]]
        assert list(figures.values()) == numbers
