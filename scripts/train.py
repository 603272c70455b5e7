"""QLoRA with DEFT on one machine, GPU or CPU, from a 4-bit base model to an adapter that generates.

    python scripts/train.py                                     # shipped model and task, no hub, no GPU
    python scripts/train.py --loss-type cayley_trans --loss-kwargs '{"floor_coefficient": 0.3}'
    python scripts/train.py --model smollm2 --dataset asdiv     # a real model and real data, out of packages
    python scripts/train.py --model Qwen/Qwen3-0.6B-Base --dataset trl-lib/Capybara --learning-rate 2e-4 \\
        --batch-size 4 --accumulation 8 --max-length 1024

The base model is loaded in 4 bit (NF4), LoRA adapters are fitted with TRL's SFTTrainer and the chosen
objective, and held-out figures before and after are printed as a table. The adapter is saved, loaded again onto
a fresh base model and used to generate. --output gets the adapter, the figures (results.json), the trainer's
log (trainer_state.json) and its plot (metrics.png).
"""

from __future__ import annotations

import process_setup  # noqa: F401

# isort: split
import gc
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import typer
from adapter import in_float32, lora_config
from answer_tokens import answer_tokens, exact_answers
from data import load_data
from datasets import Dataset
from peft import PeftModel
from real_data import DATA_SETS
from real_model import NAME as REAL_MODEL
from real_model import get_real_model
from report import ConsoleLog, answers_table, console, results_table
from tasks import FINE_TUNING_TASKS, evaluate, greedy_answers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from deft_plugin import keep_cpu_weights_unpacked
from deft_plugin.metrics import METRICS
from deft_plugin.plot import plot_metrics
from deft_plugin.report.checkpoint import load_tokenizer as load_models_tokenizer
from deft_plugin.trl import SFTConfig, SFTTrainer

BASE_MODEL = Path(__file__).resolve().parent.parent / "assets" / "base_model"
ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# For base models that have none; an answer ends with the token that generation stops at.
CHAT_TEMPLATE = (
    "{{- bos_token if bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '### ' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] -}}"
    "{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### assistant\n' -}}{%- endif -%}"
)
SHOWN = 4  # answers in the table at the end
COMPARED = 64  # answers of the reloaded adapter that are compared with those before it was saved


Prompt: TypeAlias = str | list[dict[str, str]]


@dataclass(frozen=True)
class HeldOut:
    """What a model does on the held-out split: figures by name, and answers to the first prompts."""

    figures: dict[str, float]
    answers: list[str]


def load_tokenizer(name: str, chat_template: Path | None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token and a chat template."""
    tokenizer = load_models_tokenizer(name, chat_template, option="--model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_base(name: str, four_bit: bool) -> PreTrainedModel:
    """The base model, in 4 bit unless told otherwise, on the GPU if there is one."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=DTYPE,
        bnb_4bit_use_double_quant=ON_GPU,
    )
    model = AutoModelForCausalLM.from_pretrained(
        name,
        quantization_config=quantization if four_bit else None,
        device_map="auto" if ON_GPU else {"": "cpu"},
        dtype=DTYPE,
    )
    keep_cpu_weights_unpacked(model)
    return model


def prompt_and_reference(row: dict[str, Any]) -> tuple[Prompt, str]:
    """A row in two: what a model is asked, and the text that is expected of it."""
    if "messages" in row:
        prompt, reference = row["messages"][:-1], row["messages"][-1:]
    elif "text" in row:
        half = len(row["text"]) // 2
        prompt, reference = row["text"][:half], row["text"][half:]
    else:
        prompt, reference = row["prompt"], row["completion"]
    return prompt, reference if isinstance(reference, str) else reference[-1]["content"]


def measure(
    trainer: SFTTrainer,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    answers_are_short: bool = False,
) -> HeldOut:
    """The trainer's held-out metrics and some answers.

    Of a task, also the accuracy of all its answers by its scorer, and where `answers_are_short`, the share that is the
    reference word for word.
    """
    metrics = trainer.evaluate()
    # "loss" is for TRL's own losses, which have few metrics; it is nll under loss_type="nll".
    names = METRICS if "eval_nll" in metrics else ("loss", "entropy", "mean_token_accuracy")
    figures = {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}
    if "task" in rows.column_names:
        result = evaluate(trainer.model, tokenizer, rows, batch_size=COMPARED)
        return HeldOut(
            {"answer_accuracy": result.accuracy, "nll": result.nll, **figures},
            result.answers[:COMPARED],
        )
    if answers_are_short:
        batch_size = trainer.args.per_device_eval_batch_size
        tokens = answer_tokens(trainer.model, tokenizer, rows.to_list(), batch_size)
        figures = {"answer_accuracy": exact_answers(tokens), **figures}
    prompts = [prompt_and_reference(row)[0] for row in rows.take(min(SHOWN, len(rows)))]
    return HeldOut(figures, greedy_answers(trainer.model, tokenizer, prompts))


def save_whole(trainer: SFTTrainer, folder: Path) -> None:
    """Save adapter and tokenizer so that `folder` has all of it or, after an interruption, what it had."""
    partial = folder.with_name(folder.name + ".partial")
    trainer.save_model(str(partial))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def main(
    model: str = typer.Option(
        str(BASE_MODEL),
        help=f"Base model: a folder, a name on the hub, or {REAL_MODEL}, which a package ships.",
    ),
    dataset: str = typer.Option(
        "spell_backward",
        help=f"A task ({', '.join(FINE_TUNING_TASKS)}), real data ({', '.join(DATA_SETS)}), a file, a folder, or a name on the hub, in any of "
        "TRL's formats.",
    ),
    dataset_config: str | None = typer.Option(None, help="Configuration of a hub data set."),
    train_split: str = typer.Option("train", help="Split to train on."),
    held_out_split: str | None = typer.Option(
        None,
        help="Split to measure on; by default test or validation, else a tenth of the training split.",
    ),
    columns: str | None = typer.Option(
        None,
        help="Columns without TRL's names: 'question,answer' for prompt and completion, or one of texts or "
        "messages.",
    ),
    chat_template: Path | None = typer.Option(
        None,
        exists=True,
        dir_okay=False,
        help="A Jinja file in place of the model's chat template.",
    ),
    loss_type: str = typer.Option("deft", help="Objective; `deft objectives` lists them."),
    loss_kwargs: str | None = typer.Option(None, help="The objective's parameters, as JSON."),
    output: Path = typer.Option(Path("runs/demo"), help="Folder for adapter, figures and plot."),
    steps: int = typer.Option(200, min=1, help="Optimizer steps."),
    batch_size: int = typer.Option(32, min=1, help="Examples per forward pass."),
    accumulation: int = typer.Option(1, min=1, help="Forward passes per step."),
    learning_rate: float = typer.Option(
        2e-3,
        min=0.0,
        help="Peak, after 5 % warm-up; then cosine. Large models need less, about 2e-4.",
    ),
    rank: int = typer.Option(16, min=1, help="Rank of LoRA; alpha is twice that."),
    max_length: int = typer.Option(256, min=2, help="Tokens per example; longer ones are cut."),
    packing: bool = typer.Option(False, help="Put several examples into a row of --max-length."),
    assistant_only: bool = typer.Option(
        False, help="Of messages, train on what the assistant says."
    ),
    train_rows: int = typer.Option(8000, min=1, help="Training examples to use."),
    held_out_rows: int = typer.Option(256, min=1, help="Held-out examples to use."),
    four_bit: bool = typer.Option(True, help="Load the base model in 4 bit."),
    seed: int = typer.Option(1, min=0, help="Seeds data, adapter and order."),
) -> None:
    """Fit a LoRA adapter to a 4-bit base model with a gated objective, and show what it learnt."""
    start = time.monotonic()
    set_seed(seed)
    try:
        arguments = SFTConfig(
            output_dir=str(output),
            loss_type=loss_type,
            loss_kwargs=loss_kwargs,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            max_length=max_length,
            packing=packing,
            assistant_only_loss=assistant_only,
            logging_steps=max(1, steps // 20),
            eval_strategy="steps",
            eval_steps=max(1, steps // 4),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not ON_GPU,
            bf16=ON_GPU,
            gradient_checkpointing=ON_GPU,
            dataloader_pin_memory=ON_GPU,
            seed=seed,
        )
        if model == REAL_MODEL:
            model = str(get_real_model())
        tokenizer = load_tokenizer(model, chat_template)
        data = load_data(
            dataset,
            train_rows,
            held_out_rows,
            seed,
            config=dataset_config,
            train_split=train_split,
            held_out_split=held_out_split,
            columns=columns,
        )
    except (RuntimeError, ValueError) as error:
        raise typer.BadParameter(" ".join(str(error).split())) from None
    held_out = data["held_out"]

    console.rule(f"{loss_type} on {dataset}")
    trainer = SFTTrainer(
        model=load_base(model, four_bit),
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora_config(rank),
        callbacks=[log := ConsoleLog()],
    )
    trainer.remove_callback(PrinterCallback)
    trainable = in_float32(trainer.model)
    console.print(
        f"{Path(model).name}{' in 4 bit' if four_bit else ''}, LoRA with "
        f"{sum(p.numel() for p in trainable):,} parameters, {len(data['train'])} training and "
        f"{len(held_out)} held-out examples"
    )
    console.print("Measuring the base model ...")
    before = measure(trainer, tokenizer, held_out, dataset in DATA_SETS)
    before_log = trainer.state.log_history
    console.print("Training ...")
    with log:
        trainer.train()
    trainer.state.log_history = before_log + trainer.state.log_history
    console.print("Measuring the fine-tuned model ...")
    after = measure(trainer, tokenizer, held_out, dataset in DATA_SETS)
    console.print(
        results_table(before.figures, after.figures, f"{loss_type} on {dataset}, {steps} steps")
    )

    save_whole(trainer, output / "adapter")
    trainer.save_state()
    results = {"loss_type": loss_type, "before": before.figures, "after": after.figures}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot_metrics(trainer.state.log_history, output / "metrics.png", f"{loss_type} on {dataset}")

    del trainer
    gc.collect()  # so that a GPU need not hold the base model twice
    reloaded = PeftModel.from_pretrained(load_base(model, four_bit), str(output / "adapter"))
    asked = [prompt_and_reference(row) for row in held_out.take(len(after.answers))]
    prompts, references = zip(*asked, strict=True)
    answers = greedy_answers(reloaded, tokenizer, prompts)
    console.print(
        answers_table(
            prompts[:SHOWN], expected=references, base_model=before.answers, adapter=answers
        )
    )
    same = sum(a == b for a, b in zip(answers, after.answers, strict=True))
    console.print(
        f"The reloaded adapter gives {same} of {len(answers)} answers as before it was saved."
    )
    console.print(f"Results are in {output}. {time.monotonic() - start:.0f} seconds.")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app()
