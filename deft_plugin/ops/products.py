"""Matrix products added to a matrix of higher precision, without a copy of either factor."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger("deft_plugin")

# Rows that are copied in the accumulator's precision at a time where a device cannot add into it.
BLOCK_ROWS = 16384


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
