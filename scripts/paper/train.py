"""Trains one experiment with one objective at the paper's hyper-parameters, with TRL: full fine-tuning.

    python scripts/paper/train.py figfont --objective deft
    accelerate launch --num_processes 8 scripts/paper/train.py math --objective deft \\
        --deepspeed deepspeed_configs/zero3.json

axolotl_configs/paper-*.yaml are the same with Axolotl. Every option's default is the paper's value; what a run changes
is in its experiment.json, and under the table. The same command goes on from the last checkpoint of an interrupted run,
and does nothing after a finished one. --output gets `model`, which `evaluate.py` takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import process_setup  # noqa: F401

# isort: split
import json
import os
from importlib.metadata import version
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset, load_dataset
from report import ConsoleLog, console
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from deft_plugin.trl import SFTConfig, SFTTrainer
from paper.chat import load_tokenizer
from paper.experiments import (
    ADAM_BETAS,
    EPOCHS,
    EXPERIMENT_FILE,
    EXPERIMENTS,
    GLOBAL_BATCH_SIZE,
    LLAMA,
    OBJECTIVES,
    WARMUP,
    Experiment,
    accumulation,
    max_grad_norm,
    peak,
    training_file,
)

ON_GPU = torch.cuda.is_available()
RUN_FILE = "run.json"
PACKAGES = ("deft_plugin", "torch", "transformers", "trl")


def trl_arguments(
    experiment: Experiment,
    objective: str,
    model: str,
    ranks: int,
    *,
    global_batch_size: int = GLOBAL_BATCH_SIZE,
    micro_batch_size: int | None = None,
    max_length: int | None = None,
    learning_rate: float | None = None,
) -> dict[str, Any]:
    """The hyper-parameters in TRL's names; None is the experiment's own.

    Raises:
        ValueError: the batch cannot be shared among the ranks.
    """
    micro_batch_size = micro_batch_size or experiment.micro_batch_size
    micro_batches = accumulation(global_batch_size, micro_batch_size, ranks)
    loss_type, loss_kwargs = OBJECTIVES[objective]
    return {
        "loss_type": loss_type,
        "loss_kwargs": loss_kwargs,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "learning_rate": learning_rate or peak(model),
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,
        "optim": "adamw_torch_fused",
        "adam_beta1": ADAM_BETAS[0],
        "adam_beta2": ADAM_BETAS[1],
        "weight_decay": experiment.weight_decay,
        "max_grad_norm": max_grad_norm(micro_batches),
        "max_length": max_length or experiment.max_length,
        "packing": False,
    }


def load_conversations(path: Path) -> Dataset:
    """The file's conversations as prompt and completion, so that the loss is over the answer alone.

    Raises:
        ValueError: it is not there, or has no messages.
    """
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: scripts/paper/prepare.py writes it, or name one with --data."
        )
    rows = load_dataset("json", data_files=str(path), split="train")
    if "messages" not in rows.column_names:
        raise ValueError(
            f"{path} needs the column messages, and has {', '.join(rows.column_names)}."
        )
    return rows.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns=rows.column_names,
    )


def check_run(output: Path, settings: dict[str, Any]) -> None:
    """Keep a run's settings in its folder, and raise `ValueError` where an earlier run there had others."""
    path = output / RUN_FILE
    if path.exists():
        earlier = json.loads(path.read_text())
        changed = [
            f"{name} {earlier.get(name)!r}, now {value!r}"
            for name, value in settings.items()
            if earlier.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{output} has a run with other settings ({'; '.join(changed)}). Take another --output, or delete it."
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")


class Interruption(TrainerCallback):
    """Stops after a number of steps of this process, with a checkpoint."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count, and stop."""
        self.left -= 1
        if not self.left:
            control.should_save = control.should_training_stop = True


def save_whole(trainer: SFTTrainer, folder: Path, record: dict[str, Any]) -> None:
    """Save the model with its record, so that `folder` is there whole or not at all; on all ranks together."""
    partial = folder.with_name(folder.name + ".partial")
    trainer.save_model(str(partial))
    if trainer.is_world_process_zero():
        (partial / EXPERIMENT_FILE).write_text(json.dumps(record, indent=2) + "\n")
        partial.rename(folder)
    trainer.accelerator.wait_for_everyone()


def main(
    experiment: Annotated[str, typer.Argument(help=", ".join(EXPERIMENTS))],
    objective: Annotated[str, typer.Option(help=", ".join(OBJECTIVES))],
    model: Annotated[str, typer.Option(help="Base model: a folder, or a name on the hub.")] = LLAMA,
    data: Annotated[
        Path | None, typer.Option(help="Conversations; by default what prepare.py writes.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder; by default runs/paper/EXPERIMENT-OBJECTIVE.")
    ] = None,
    deepspeed: Annotated[
        Path | None, typer.Option(exists=True, help="DeepSpeed's configuration, for many GPUs.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="For a model without one.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Peak.")] = None,
    global_batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences a step.")
    ] = GLOBAL_BATCH_SIZE,
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a forward pass on one rank.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a sequence.")] = None,
    max_steps: Annotated[int, typer.Option(help="Steps; -1 for the whole epoch.")] = -1,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="End with a checkpoint after so many steps, to go on.")
    ] = None,
    save_steps: Annotated[
        int, typer.Option(min=1, help="Steps from checkpoint to checkpoint.")
    ] = 50,
    dtype: Annotated[
        str, typer.Option(help="The weights' own: float32, or bfloat16 as the authors' trainer.")
    ] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Order of the data.")] = 1,
) -> None:
    """Train, or go on training."""
    for option, value, choices in (
        ("EXPERIMENT", experiment, EXPERIMENTS),
        ("--objective", objective, OBJECTIVES),
        ("--dtype", dtype, ("float32", "bfloat16")),
    ):
        if value not in choices:
            raise typer.BadParameter(f"{option} {value!r} is none of {', '.join(choices)}.")
    ranks, rank = (
        int(os.environ.get(name, one)) for name, one in (("WORLD_SIZE", "1"), ("RANK", "0"))
    )
    console.quiet = rank > 0
    output = output or Path("runs/paper") / f"{experiment}-{objective}"
    data = data or training_file(experiment)
    finished = output / "model"
    try:
        arguments = trl_arguments(
            EXPERIMENTS[experiment],
            objective,
            model,
            ranks,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            max_length=max_length,
            learning_rate=learning_rate,
        )
        settings = {
            "experiment": experiment,
            "objective": objective,
            "base_model": model,
            "data": str(data),
            "ranks": ranks,
            "max_steps": max_steps,
            "dtype": dtype,
            "seed": seed,
            **arguments,
        }
        rows = load_conversations(data)
        tokenizer = load_tokenizer(model, chat_template)
        if rank == 0:
            check_run(output, settings)
    except ValueError as error:
        raise typer.BadParameter(" ".join(str(error).split())) from None
    if finished.exists():
        console.print(f"{finished} is there already, trained with these settings.")
        return

    set_seed(seed)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
            model_init_kwargs={"dtype": dtype},
            max_steps=max_steps,
            deepspeed=str(deepspeed) if deepspeed else None,
            bf16=ON_GPU,
            use_cpu=not ON_GPU,
            gradient_checkpointing=ON_GPU,
            dataloader_pin_memory=ON_GPU,
            logging_steps=1,
            save_strategy="steps",
            save_steps=save_steps,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            **arguments,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[log := ConsoleLog()],
    )
    trainer.remove_callback(PrinterCallback)
    if stop_after is not None:
        trainer.add_callback(Interruption(stop_after))
    checkpoint = get_last_checkpoint(str(output))
    console.print(
        f"{objective} on {len(rows)} conversations of {data}, {global_batch_size} a step"
        + (f", from {checkpoint}" if checkpoint else "")
    )
    with log:
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < trainer.state.max_steps:
        console.print(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; the same command goes on."
        )
        return
    papers = EXPERIMENTS[experiment]
    chosen = (
        ("learning_rate", learning_rate, peak(model)),
        ("global_batch_size", global_batch_size, GLOBAL_BATCH_SIZE),
        ("micro_batch_size", micro_batch_size, papers.micro_batch_size),
        ("max_length", max_length, papers.max_length),
        ("max_steps", max_steps, -1),
    )
    changed = {name: value for name, value, its in chosen if value not in (None, its)}
    save_whole(
        trainer,
        finished,
        {
            **settings,
            "conversations": len(rows),
            "steps": trainer.state.global_step,
            "not_the_papers": changed,
            "versions": {package: version(package) for package in PACKAGES},
        },
    )
    console.print(f"The model is in {finished}.")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app()
