"""The core's matrix products, on the paths that are fast.

A vocabulary that is no multiple of 8 (one token added to a model's) makes an accelerator's products several times slower, since
rows and columns of the weight no longer lie in whole vectors. So they are taken of the largest part of the vocabulary
that does, and of the rest, apart.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger("deft_plugin")

# Columns of a vocabulary that a product on an accelerator takes together: a multiple of this, or all.
VOCABULARY_MULTIPLE = 64
ALIGNED_VOCABULARY = 8
# Rows that are copied in the accumulator's precision at a time where a device cannot add into it.
BLOCK_ROWS = 16384


def project_(logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """logits = hidden @ weight.T, all of one dtype; (n, V), (n, H) and (V, H)."""
    for columns in vocabulary_parts(weight):
        torch.mm(hidden, weight[columns].t(), out=logits[:, columns])


def project_back_(gradient: Tensor, error: Tensor, weight: Tensor) -> None:
    """gradient = error @ weight, all of one dtype; (n, H), (n, V) and (V, H)."""
    first, *rest = vocabulary_parts(weight)
    torch.mm(error[:, first], weight[first], out=gradient)
    for columns in rest:
        gradient.addmm_(error[:, columns], weight[columns])


def add_outer_(gradient: Tensor, keep: int, error: Tensor, hidden: Tensor) -> None:
    """gradient = keep * gradient + error.T @ hidden, in its precision; (V, H), (n, V) and (n, H)."""
    for columns in vocabulary_parts(gradient):
        add_product_(gradient[columns], keep, error[:, columns].t(), hidden)


def vocabulary_parts(weight: Tensor) -> list[slice]:
    """The parts of a (V, H) weight's rows that products are taken of; one, or two."""
    vocab_size = weight.size(0)
    whole = vocab_size // VOCABULARY_MULTIPLE * VOCABULARY_MULTIPLE
    if weight.device.type == "cpu" or vocab_size % ALIGNED_VOCABULARY == 0 or whole == 0:
        return [slice(0, vocab_size)]
    return [slice(0, whole), slice(whole, vocab_size)]


def add_product_(accumulator: Tensor, keep: int, left: Tensor, right: Tensor) -> None:
    """accumulator = keep * accumulator + left @ right, in its precision whatever the factors' dtype.

    With keep = 0 the accumulator may hold anything, NaN included.
    """
    if left.dtype == accumulator.dtype:
        accumulator.addmm_(left, right, beta=keep)
    elif _accumulates_in_float32(left.device.type, left.dtype):
        torch.ops.aten.addmm.dtype_out(
            accumulator, left, right, accumulator.dtype, beta=keep, out=accumulator
        )
    else:
        right = right.to(accumulator.dtype)
        for part, rows in zip(accumulator.split(BLOCK_ROWS), left.split(BLOCK_ROWS), strict=True):
            part.addmm_(rows.to(accumulator.dtype), right, beta=keep)


@functools.cache
def _accumulates_in_float32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this device adds half-precision products to a float32 matrix without a copy of either.

    An accelerator that does not is told of once, since it multiplies in float32 then.
    """
    factor = torch.ones(16, 16, dtype=dtype, device=device_type)
    accumulator = torch.ones(16, 16, dtype=torch.float32, device=device_type)
    try:
        torch.ops.aten.addmm.dtype_out(accumulator, factor, factor, torch.float32, out=accumulator)
        obstacle = None if bool((accumulator == 17).all()) else "its result is wrong"
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        obstacle = (str(error).strip() or type(error).__name__).splitlines()[0]
    if obstacle is not None and device_type != "cpu":
        logger.warning(
            "The lm_head's gradient is multiplied in float32, which is slower, since torch %s cannot add a product in "
            "%s to a float32 matrix here: %s. PYTORCH_TUNABLEOP_ENABLED=1 is one cause.",
            torch.__version__,
            dtype,
            obstacle,
        )
    return obstacle is None
