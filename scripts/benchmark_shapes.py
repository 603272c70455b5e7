"""The shapes by which the repository's own figures are measured."""

from __future__ import annotations

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


def parse_shape(text: str) -> tuple[int, int, int]:
    """N,V,H as three integers."""
    try:
        tokens, vocab, hidden = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--shape {text!r} must be N,V,H: tokens, vocabulary and hidden size."
        ) from None
    if min(tokens, vocab, hidden) < 1:
        raise ValueError(f"--shape {text!r}: every number must be at least 1.")
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
