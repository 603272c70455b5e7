"""One measurement: its sizes, what it runs on, and inputs of that size."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
DTYPES = ("float32", "bfloat16", "float16")
INPUTS = ("trained", "random")


@dataclass(frozen=True)
class Job:
    """One measurement: N tokens, V logits per token, H hidden units.

    Attributes:
        frozen: whether the lm_head's weight has no gradient.
        inputs: "trained" for logits as peaked as a trained model's, or "random".
        masked: share of the labels that is `IGNORED`.
    """

    tokens: int
    vocab: int
    hidden: int
    frozen: bool
    dtype: str
    inputs: str
    device: str
    repetitions: int
    masked: float = 0.0

    @property
    def masked_tokens(self) -> int:
        """How many labels are masked."""
        return _masked_of(self.tokens, self.masked)

    @property
    def title(self) -> str:
        """What the table is headed by."""
        masked = f", {self.masked:.0%} of the labels masked" if self.masked else ""
        return (
            f"N={self.tokens:,} V={self.vocab:,} H={self.hidden:,} {self.dtype}, "
            f"{'frozen' if self.frozen else 'trainable'} head, {self.inputs} logits{masked}"
        )


def _masked_of(tokens: int, share: float) -> int:
    return round(tokens * share)


def make_inputs(job: Job, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the weight and the targets; hidden states lean to their target if "trained"."""
    generator = torch.Generator(job.device).manual_seed(seed)
    options: Any = {"generator": generator, "device": job.device}
    dtype = getattr(torch, job.dtype)
    weight = torch.randn(job.vocab, job.hidden, dtype=dtype, **options).div_(job.hidden**0.5)
    targets = torch.randint(job.vocab, (tokens,), **options)
    hidden = torch.randn(tokens, job.hidden, **options)
    if job.inputs == "trained":
        lean = 25 * torch.rand(tokens, 1, **options)
        hidden += lean * weight[targets].float()
    masked = torch.randperm(tokens, **options)[: _masked_of(tokens, job.masked)]
    targets[masked] = IGNORED
    return hidden.to(dtype), weight, targets


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` where a value is not among the choices."""
    if value not in choices:
        raise ValueError(
            f"{option} {value!r} is unknown. Choices: {', '.join(map(repr, choices))}."
        )


def resolve_device(device: str) -> str:
    """What --device means here: "cuda" or "cpu".

    Raises:
        ValueError: another name, a GPU that is not there, or a CPU whose memory cannot be measured.
    """
    check_choice("--device", device, ("auto", "cuda", "cpu"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device 'cuda': there is no GPU here. Choices: cpu.")
    if device == "cpu" and not sys.platform.startswith("linux"):
        raise ValueError("--device 'cpu': memory on a CPU is measured under Linux alone.")
    return device


def resolve_dtype(dtype: str | None, device: str) -> str:
    """What --dtype means: without one float32 on a CPU, bfloat16 on a GPU.

    Raises:
        ValueError: none of `DTYPES`.
    """
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    check_choice("--dtype", dtype, DTYPES)
    return dtype
