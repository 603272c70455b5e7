"""One contestant of `benchmark.py step`: a QLoRA fine-tune of random weights through TRL's SFTTrainer.

    python scripts/training_step.py deft cuda 8        # prints a line of JSON

On a GPU the model has the shape of Llama 3.1 8B: NF4, LoRA of rank 16 on all linear layers, gradient checkpointing, one
sequence of 4096 tokens a step. On a CPU it is a small model of the same kind.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

from deft_plugin import keep_cpu_weights_unpacked
from deft_plugin.trl import SFTConfig, SFTTrainer

# The first is what the others are compared with.
LOSS_TYPES = ("nll", "deft", "cayley_trans")
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Shape:
    """A model and a sequence."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocab_size: int
    tokens: int

    @property
    def title(self) -> str:
        """What the table is headed by."""
        return (
            f"{self.layers} layers, hidden size {self.hidden_size:,}, vocabulary {self.vocab_size:,}, "
            f"{self.tokens:,} tokens, NF4, LoRA r=16, gradient checkpointing"
        )


SHAPES = {
    "cuda": Shape(4096, 14336, 32, 32, 8, 128256, 4096),
    "cpu": Shape(256, 768, 4, 4, 2, 32768, 512),
}


class Stopwatch(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self._synchronise()
        if state.global_step == WARM_UP_STEPS and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self._synchronise()
        self.seconds.append(time.perf_counter() - self.start)

    def _synchronise(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def make_model(shape: Shape, device: str) -> LlamaForCausalLM:
    """A Llama with random weights whose linear layers, the lm_head apart, are in NF4."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=max(8192, shape.tokens),
        tie_word_embeddings=False,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, name, _in_nf4(module, dtype, device))
    model.is_loaded_in_4bit = True
    keep_cpu_weights_unpacked(model)
    return model


def _in_nf4(linear: nn.Linear, dtype: torch.dtype, device: str) -> nn.Module:
    quantised = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
    )
    quantised.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data.cpu(), requires_grad=False, quant_type="nf4"
    )
    return quantised.to(device)


def main(loss_type: str, device: str, steps: int) -> None:
    """Train for some steps and print tokens per second and peak memory as JSON."""
    set_seed(0)
    shape = SHAPES[device]
    vocabulary = {f"t{index}": index for index in range(shape.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")),
        eos_token="t1",
        pad_token="t2",
    )
    rows = torch.randint(3, shape.vocab_size, (steps + WARM_UP_STEPS, shape.tokens)).tolist()
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=make_model(shape, device),
            args=SFTConfig(
                output_dir=folder,
                loss_type=loss_type,
                max_length=shape.tokens,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=1,
                max_steps=steps + WARM_UP_STEPS,
                gradient_checkpointing=True,
                bf16=device == "cuda",
                use_cpu=device == "cpu",
                save_strategy="no",
                logging_steps=steps + WARM_UP_STEPS,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[stopwatch],
        )
        trainer.train()
    seconds = statistics.median(stopwatch.seconds[WARM_UP_STEPS:])
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    print(json.dumps({"tokens_per_second": shape.tokens / seconds, "peak_mib": peak}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
