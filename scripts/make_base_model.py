"""Trains the demo's base model from scratch and saves it: a decoder of 3.5 million parameters.

    python scripts/make_base_model.py                          # makes assets/base_model anew
    python scripts/make_base_model.py --steps 100 --output /tmp/trial

The model is a Qwen3 decoder over bytes, trained on the mixture of `tasks.PRETRAINING_TASKS`. Its folder
holds bf16 weights, the tokenizer with its chat template, and a model card with the figures of the run.
"""

from __future__ import annotations

import process_setup  # noqa: F401

# isort: split
import math
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tasks import IGNORED, PRETRAINING_TASKS, Evaluation, evaluate, make_mixture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from trl import pack_dataset

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# The generation block marks what the assistant says, for losses on the answers alone.
CHAT_TEMPLATE = (
    "{{- '<|begin|>' -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

console = Console()


@dataclass(frozen=True)
class Run:
    """What a training run took and gave."""

    seed: int
    steps: int
    tokens: int
    examples: int
    minutes: float
    threads: int
    parameters: int
    results: dict[str, Evaluation]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte of UTF-8, so that any text can be written and letters stay visible."""
    special = [PAD, BEGIN, END, *ROLES]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> Qwen3ForCausalLM:
    """A decoder with random weights. Widths are multiples of 64, the block size of NF4."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def pack(mixture: Dataset, tokenizer: PreTrainedTokenizerFast, row_length: int) -> Dataset:
    """Tokenizes the examples and packs whole ones into rows of at most `row_length` tokens."""

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        turns = zip(batch["prompt"], batch["completion"], strict=True)
        texts = tokenizer.apply_chat_template([p + c for p, c in turns], return_dict=True)
        return {"input_ids": texts["input_ids"]}

    tokens = mixture.map(tokenize, batched=True, remove_columns=mixture.column_names)
    return pack_dataset(tokens, row_length, strategy="bfd")


def collate(rows: list[dict], row_length: int, pad_token_id: int) -> dict[str, Tensor]:
    """Rows of packed examples to tensors of shape (rows, row_length).

    Positions start again at 0 with each example; from this the model makes its attention mask, so that
    the examples of a row do not see each other.
    """
    batch = {
        "input_ids": torch.full((len(rows), row_length), pad_token_id),
        "labels": torch.full((len(rows), row_length), IGNORED),
        "position_ids": torch.arange(row_length).repeat(len(rows), 1),
    }
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        tokens = torch.tensor(row["input_ids"])
        batch["input_ids"][index, :length] = tokens
        batch["labels"][index, :length] = tokens
        starts = [0]
        for example_length in row["seq_lengths"]:
            # The first token of an example must not be predicted from the example before.
            batch["labels"][index, starts[-1]] = IGNORED
            starts.append(starts[-1] + example_length)
        lengths = [*row["seq_lengths"], row_length - length]
        batch["position_ids"][index] = torch.cat([torch.arange(n) for n in lengths])
    return batch


def train(
    model: PreTrainedModel, batches: DataLoader, steps: int, learning_rate: float
) -> tuple[int, int]:
    """Next-token training with AdamW; returns the numbers of tokens and of optimizer steps."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 25), steps)
    tokens, done, running = 0, 0, math.nan
    model.train()
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=steps, loss=math.nan)
        while done < steps:
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(**batch, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                done += 1
                tokens += int((batch["labels"] != IGNORED).sum())
                value = loss.item()
                running = value if math.isnan(running) else 0.98 * running + 0.02 * value
                progress.update(bar, advance=1, loss=running)
                if done % max(1, steps // 20) == 0:
                    rate = schedule.get_last_lr()[0]
                    console.log(f"step {done}  loss {running:.4f}  learning rate {rate:.2e}")
                if done == steps:
                    break
    return tokens, done


def results_table(results: dict[str, Evaluation]) -> Table:
    """The held-out figures, a task a line."""
    table = Table("task", "held-out nll (nats/token)", "accuracy", title="Held-out questions")
    for name, result in results.items():
        table.add_row(name, f"{result.nll:.3f}", f"{result.accuracy:.1%}")
    return table


def model_card(run: Run) -> str:
    """The README of the model's folder."""
    rows = "\n".join(
        f"| {name} | {result.nll:.3f} | {result.accuracy:.1%} |"
        for name, result in run.results.items()
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---
# A small base model for the fine-tuning demo

A Qwen3 decoder of {run.parameters / 1e6:.2f} million parameters over bytes, made by
`scripts/make_base_model.py` from random weights. It knows the form of short questions and answers of the
kinds below, a part of the answers themselves (see the accuracies), and nothing else; it is there to be
fine-tuned on a further kind in minutes, without a GPU.

| training | |
|---|---|
| data | the tasks of the table below from reasoning_gym {version("reasoning-gym")}: {run.examples} generated questions and answers, of which none was seen twice |
| loss | mean next-token negative log-likelihood over questions and answers |
| optimizer | AdamW, cosine schedule with warm-up, bf16 autocast |
| steps | {run.steps} |
| tokens | {run.tokens} |
| time | {run.minutes:.0f} minutes with {run.threads} CPU thread(s) |
| seed | {run.seed} |

Held-out questions, none of them in the training data; nll is per token of the reference answer, in nats;
accuracy is the share of greedy answers with full marks from reasoning_gym's scorer:

| task | nll | accuracy |
|---|---|---|
{rows}
"""


def main(
    output: Annotated[Path, typer.Option(help="Folder to save the model in.")] = Path(
        "assets/base_model"
    ),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 3000,
    batch_size: Annotated[int, typer.Option(help="Packed rows per step.")] = 8,
    row_length: Annotated[int, typer.Option(help="Tokens per packed row.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    hidden: Annotated[int, typer.Option(help="Hidden units, a multiple of 64.")] = 256,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 4,
    held_out: Annotated[int, typer.Option(help="Held-out questions per task.")] = 256,
    seed: Annotated[int, typer.Option(help="Seeds weights, questions and order.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train the base model from scratch and save it with its tokenizer and model card."""
    torch.set_num_threads(threads)
    set_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, hidden, layers)

    # About 110 tokens an example: enough of them that none is needed twice.
    examples = math.ceil(steps * batch_size * row_length / 85 / len(PRETRAINING_TASKS))
    mixture, held_out_splits = make_mixture(PRETRAINING_TASKS, examples, held_out, seed)
    packed = pack(mixture, tokenizer, row_length)
    console.log(f"{len(mixture)} examples in {len(packed)} rows of {row_length} tokens")
    batches = DataLoader(
        packed,
        batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=lambda rows: collate(rows, row_length, tokenizer.pad_token_id),
    )

    start = time.perf_counter()
    tokens, steps = train(model, batches, steps, learning_rate)
    minutes = (time.perf_counter() - start) / 60

    # The figures are those of the weights as they are saved, rounded to bf16.
    model.to(torch.bfloat16).to(torch.float32)
    results = {name: evaluate(model, tokenizer, rows) for name, rows in held_out_splits.items()}
    console.print(results_table(results))
    parameters = sum(p.numel() for p in model.parameters())
    run = Run(seed, steps, tokens, len(mixture), minutes, threads, parameters, results)

    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text(model_card(run))
    size = (output / "model.safetensors").stat().st_size / 1e6
    console.log(f"saved to {output}: {parameters / 1e6:.2f} million parameters, {size:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
