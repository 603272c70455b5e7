"""TRL's SFTTrainer with the repository's DeepSpeed configurations does on two processes what it does on one.

The processes are started as torchrun starts them, and load the model as users do, by its name.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from deft_plugin.metrics import METRICS

from ..tiny import tiny_model, tiny_tokenizer
from ..updates import Rows, make_rows
from .deepspeed_files import DIRECTORY
from .ranks import run_ranks
from .steps import Parameters, Run, assert_same_parameters, whole_parameters

if not find_spec("trl") or not find_spec("deepspeed"):
    pytest.skip("TRL and DeepSpeed are needed", allow_module_level=True)

STEPS = 5
RUNS = [
    Run("deft"),
    Run("cayley_trans", {"scope": "fixed", "mean_probability": 0.3}),
    Run("deft", model="tied"),
    Run("deft", model="lora"),
]
COMPARED = ("loss", "grad_norm", *METRICS)


def make_step_rows() -> Rows:
    """Four rows a step. In the second step one rank has no label; in the third, neither has in one micro-batch."""
    rows = make_rows(4 * STEPS)
    for index in (5, 7, 8, 9):
        rows[index]["labels"] = [-100] * len(rows[index]["labels"])
    return rows


def save_models(directory: Path) -> None:
    """What `Run.model` stands for."""
    for kind in ("full", "tied", "lora"):
        model = tiny_model("llama", initializer_range=0.08, tie_word_embeddings=kind == "tied")
        model.save_pretrained(directory / kind)
        tiny_tokenizer().save_pretrained(directory / kind)


def train(run: Run, directory: Path, **options: Any) -> tuple[list[dict[str, float]], Parameters]:
    """The log and the whole parameters after training a model in `directory`."""
    from accelerate.state import AcceleratorState

    from ..trl_adapter.running import config, make_trainer

    # What an earlier run in this process, or in the one that it was forked from, has left behind.
    AcceleratorState._reset_state(reset_partial_state=True)
    args = config(
        directory,
        loss_type=run.objective,
        loss_kwargs=run.parameters,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        model_init_kwargs={"dtype": "float32"},
        **options,
    )
    torch.manual_seed(0)
    trainer = make_trainer(
        args,
        make_step_rows(),
        str(directory / run.model),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if run.model == "lora" else None,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return log, whole_parameters(trainer.model)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["zero1", "zero2", "zero3"])
def test_two_processes_have_the_log_and_the_parameters_of_one(file: str, tmp_path: Path) -> None:
    save_models(tmp_path)

    def on(rank: int) -> Any:
        import deepspeed

        # Which transformers leaves out with use_cpu, and loading under ZeRO-3 needs.
        deepspeed.init_distributed(dist_backend="gloo")
        return [
            train(
                run,
                tmp_path,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=2,
                deepspeed=str(DIRECTORY / f"{file}.json"),
            )
            for run in RUNS
        ]

    ranks = run_ranks(on, tmp_path)
    for index, run in enumerate(RUNS):
        expected_log, expected = train(run, tmp_path, per_device_train_batch_size=4)
        for results in ranks:
            log, parameters = results[index]
            assert len(log) == STEPS
            for entry, reference in zip(log, expected_log, strict=True):
                for name in COMPARED:
                    assert entry[name] == pytest.approx(reference[name], rel=1e-4), (run, name)
            assert_same_parameters(parameters, expected, run)
