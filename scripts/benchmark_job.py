"""What the benchmark of losses measures: sizes, and inputs of that size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import typer
from torch import Tensor

IGNORED = -100
# (N, V, H): tokens, vocabulary, hidden size. 128,257 is a vocabulary with one token added.
GPU_SHAPES = (
    "8192,32000,4096",
    "8192,128256,4096",
    "8192,128257,4096",
    "8192,151936,3584",
    "16384,248320,2048",
    "4096,262144,2304",
    "65536,128256,4096",
)
# Measured with half of the labels masked as well, as in training on completions alone.
GPU_MASKED_SHAPES = ("8192,128256,4096", "8192,151936,3584", "65536,128256,4096")
CPU_SHAPES = ("2048,32768,512",)
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


def parse_shape(text: str) -> tuple[int, int, int]:
    """N,V,H as three integers."""
    try:
        tokens, vocab, hidden = (int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"--shape {text!r} must be N,V,H: tokens, vocabulary and hidden size."
        ) from None
    if min(tokens, vocab, hidden) < 1:
        raise typer.BadParameter(f"--shape {text!r}: every number must be at least 1.")
    return tokens, vocab, hidden


def sizes_and_masks(
    device: str, shapes: list[str] | None, masked: float | None
) -> list[tuple[tuple[int, int, int], float]]:
    """The (N, V, H) to measure, each with the share of its labels that is masked.

    Args:
        shapes: those asked for; None for the device's own.
        masked: the share asked for; None for none of the labels, and on a GPU's own shapes half as well.
    """
    own = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    whole = [(parse_shape(text), masked or 0.0) for text in shapes or own]
    if shapes or masked is not None or device == "cpu":
        return whole
    return whole + [(parse_shape(text), 0.5) for text in GPU_MASKED_SHAPES]


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise typer.BadParameter(
            f"{option} {value!r} is not one of: {', '.join(map(repr, choices))}."
        )


def resolve_device(device: str) -> str:
    """What --device means here: "cuda" or "cpu"."""
    check_choice("--device", device, ("auto", "cuda", "cpu"))
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device 'cuda': there is no GPU here.")
    return device
