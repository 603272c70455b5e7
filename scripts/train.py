"""QLoRA with DEFT on one machine, GPU or CPU, from a 4-bit base model to an adapter that generates.

    python scripts/train.py                                     # shipped model and task, no hub, no GPU
    python scripts/train.py --loss-type cayley_trans --loss-kwargs '{"floor_coefficient": 0.3}'
    python scripts/train.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --max-length 1024

The base model is loaded in 4 bit (NF4), LoRA adapters are fitted with TRL's SFTTrainer and the chosen
objective, and held-out figures before and after are printed as a table. The adapter is saved, loaded again onto
a fresh base model and used to generate. Everything is written to --output: the adapter, the held-out
figures (results.json), the training log (trainer_state.json) and its plot (metrics.png).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from peft import LoraConfig, PeftModel
from plot_metrics import plot_metrics
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tasks import FINE_TUNING_TASKS, evaluate, make_splits
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from deft_plugin.metrics import METRICS
from deft_plugin.quantization import keep_cpu_weights_unpacked
from deft_plugin.trl import SFTConfig, SFTTrainer

BASE_MODEL = Path(__file__).resolve().parent.parent / "assets" / "base_model"
LOGGED = {
    "nll": "nll",
    "mean_token_accuracy": "accuracy",
    "mean_focus": "focus",
    "mean_gate": "gate",
}

console = Console()


@dataclass
class Figures:
    """Held-out figures of one model by name, and its greedy answers where the data is a task."""

    values: dict[str, float]
    answers: list[str] = field(default_factory=list)


class ConsoleLog(TrainerCallback):
    """A progress bar, and one aligned line of metrics for every logged step."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("fine-tuning"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        self.bar = self.progress.add_task("train", total=state.max_steps)
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.progress.update(self.bar, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Print the metrics of a training window."""
        if logs and "objective_loss" in logs:
            columns = "  ".join(
                f"{short} {logs[name]:.3f}" for name, short in LOGGED.items() if name in logs
            )
            console.print(f"step {state.global_step:5}  loss {logs['loss']:.3f}  {columns}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the bar."""
        self.progress.stop()


def load_base(name: str, four_bit: bool) -> PreTrainedModel:
    """The base model, in 4 bit unless told otherwise, on this process's GPU or on the CPU."""
    on_gpu = torch.cuda.is_available()
    compute_dtype = torch.bfloat16 if on_gpu else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=on_gpu,
    )
    model = AutoModelForCausalLM.from_pretrained(
        name,
        quantization_config=quantization if four_bit else None,
        device_map={"": int(os.environ.get("LOCAL_RANK", 0)) if on_gpu else "cpu"},
        dtype=compute_dtype,
    )
    keep_cpu_weights_unpacked(model)
    return model


def load_data(dataset: str, train_rows: int, held_out_rows: int, seed: int) -> DatasetDict:
    """Splits `train` and `held_out` of a shipped task, a folder or file on disk, or a hub data set."""
    if dataset in FINE_TUNING_TASKS:
        return make_splits(FINE_TUNING_TASKS[dataset], train_rows, held_out_rows, seed)
    path = Path(dataset)
    if path.is_file():
        data = load_dataset("json", data_files=str(path))
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        data = load_from_disk(str(path))
    else:
        data = load_dataset(dataset)
    splits = data if isinstance(data, DatasetDict) else DatasetDict(train=data)
    if "train" not in splits:
        raise typer.BadParameter(f"{dataset!r} has no split 'train', but {', '.join(splits)}.")
    train = splits["train"].shuffle(seed)
    for name in ("held_out", "test", "validation"):
        if name in splits:
            held_out = splits[name].shuffle(seed)
            break
    else:
        parts = train.train_test_split(min(held_out_rows, max(1, len(train) // 10)), seed=seed)
        train, held_out = parts["train"], parts["test"]
    return DatasetDict(
        train=train.select(range(min(train_rows, len(train)))),
        held_out=held_out.select(range(min(held_out_rows, len(held_out)))),
    )


def measure(trainer: SFTTrainer, tokenizer: Any, held_out: Dataset, is_task: bool) -> Figures:
    """Held-out figures of the trainer's model: its metrics and, for a task, exact-match accuracy."""
    metrics = trainer.evaluate()
    values = {name: metrics[f"eval_{name}"] for name in METRICS if f"eval_{name}" in metrics}
    if not is_task:
        return Figures(values)
    result = evaluate(trainer.model, tokenizer, held_out)
    return Figures({"accuracy": result.accuracy, **values}, result.answers)


def results_table(before: Figures, after: Figures, title: str) -> Table:
    """The held-out figures before and after, one line each."""
    table = Table(title=title)
    for column in ("held out", "before", "after"):
        table.add_column(column, justify="left" if column == "held out" else "right")
    for name, value in before.values.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}", f"{after.values[name]:.4f}")
    return table


def show_answers(held_out: Dataset, before: Figures, after: list[str], count: int = 4) -> None:
    """Print some held-out questions with the answers of the base model and of the reloaded adapter."""
    table = Table(title="answers of the reloaded adapter")
    for column in ("question", "expected", "base model", "with adapter"):
        table.add_column(column)
    for row, base_answer, answer in zip(held_out, before.answers, after[:count], strict=False):
        expected = row["completion"][0]["content"]
        table.add_row(row["prompt"][0]["content"], expected, base_answer, answer)
    console.print(table)


def parse_json(text: str | None) -> Mapping[str, Any] | None:
    """A JSON object given on the command line."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--loss-kwargs {text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"--loss-kwargs {text!r} must be a JSON object.")
    return value


def main(
    model: str = typer.Option(str(BASE_MODEL), help="Base model: a folder, or a name on the hub."),
    dataset: str = typer.Option(
        "spell_backward",
        help=f"A shipped task ({', '.join(FINE_TUNING_TASKS)}), a .jsonl file, a folder, or a name on the "
        "hub, in any of TRL's formats.",
    ),
    loss_type: str = typer.Option("deft", help="Objective; `deft objectives` lists them."),
    loss_kwargs: str | None = typer.Option(None, help="The objective's parameters, as JSON."),
    output: Path = typer.Option(Path("runs/demo"), help="Folder for adapter, figures and plot."),
    steps: int = typer.Option(300, min=1, help="Optimizer steps."),
    batch_size: int = typer.Option(32, min=1, help="Examples per forward pass."),
    accumulation: int = typer.Option(1, min=1, help="Forward passes per step."),
    learning_rate: float = typer.Option(
        2e-3, min=0.0, help="Peak, after 5 % warm-up; then cosine."
    ),
    rank: int = typer.Option(16, min=1, help="Rank of LoRA; alpha is twice that."),
    max_length: int = typer.Option(256, min=2, help="Tokens per example; longer ones are cut."),
    train_rows: int = typer.Option(8000, min=1, help="Training examples to use."),
    held_out_rows: int = typer.Option(256, min=1, help="Held-out examples to use."),
    four_bit: bool = typer.Option(True, help="Load the base model in 4 bit."),
    seed: int = typer.Option(1, min=0, help="Seeds data, adapter and order."),
) -> None:
    """Fit a LoRA adapter to a 4-bit base model with a gated objective, and show what it learnt."""
    start = time.monotonic()
    set_seed(seed)
    is_task = dataset in FINE_TUNING_TASKS
    arguments = SFTConfig(
        output_dir=str(output),
        loss_type=loss_type,
        loss_kwargs=parse_json(loss_kwargs),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        max_length=max_length,
        logging_steps=max(1, steps // 20),
        eval_strategy="steps",
        eval_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    console.rule(f"{loss_type} on {dataset}")
    data = load_data(dataset, train_rows, held_out_rows, seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = SFTTrainer(
        model=load_base(model, four_bit),
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["held_out"],
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[ConsoleLog()],
    )
    trainer.remove_callback(PrinterCallback)
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    console.print(
        f"{len(data['train'])} training and {len(data['held_out'])} held-out examples; "
        f"{trainable:,} trainable parameters"
    )
    console.print("Measuring the base model ...")
    before = measure(trainer, tokenizer, data["held_out"], is_task)
    trainer.train()
    console.print("Measuring the fine-tuned model ...")
    after = measure(trainer, tokenizer, data["held_out"], is_task)
    console.print(results_table(before, after, f"{loss_type} on {dataset}, {steps} steps"))

    trainer.save_model()
    trainer.save_state()
    results = {"loss_type": loss_type, "before": before.values, "after": after.values}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot_metrics(trainer.state.log_history, output / "metrics.png", f"{loss_type} on {dataset}")

    reloaded = PeftModel.from_pretrained(load_base(model, four_bit), str(output))
    if is_task:
        answers = evaluate(reloaded, tokenizer, data["held_out"].select(range(32))).answers
        same = sum(a == b for a, b in zip(answers, after.answers, strict=False))
        show_answers(data["held_out"], before, answers)
        console.print(
            f"{same} of {len(answers)} answers are those of the model before it was saved."
        )
    else:
        prompt = tokenizer("The", return_tensors="pt").to(reloaded.device)
        output_ids = reloaded.generate(**prompt, max_new_tokens=32, do_sample=False)
        console.print("Generated:", tokenizer.decode(output_ids[0]))
    console.print(
        f"Adapter, figures and plot are in {output}. {time.monotonic() - start:.0f} seconds."
    )


if __name__ == "__main__":
    typer.run(main)
