"""Whether Triton folds the tiles: chosen on a GPU, forced by name, and its absence told once."""

from __future__ import annotations

import functools
import logging
import os

import torch

logger = logging.getLogger("deft_plugin")

TRITON_DEVICES = ("cuda", "xpu")  # ROCm's device type is "cuda" too.


def chooses_triton(path: str, device: torch.device) -> bool:
    """Whether `path` on `device` means Triton.

    Raises:
        ValueError: path is "triton", and Triton cannot run there; the message says why.
    """
    if path == "triton":
        obstacle = _obstacle(device.type)
        if obstacle:
            raise ValueError(f"path='triton' cannot run: {obstacle} Use 'auto' or 'chunked'.")
        return True
    if path != "auto" or device.type not in TRITON_DEVICES:
        return False
    obstacle = _obstacle(device.type)
    if obstacle:
        _tell_once(obstacle)
    return not obstacle


@functools.cache
def _obstacle(device_type: str) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device_type not in TRITON_DEVICES and not interpreted:
        return (
            f"a tensor on {device_type!r} is not on a GPU (and TRITON_INTERPRET=1, which runs kernels "
            "in Triton's interpreter, is not set)."
        )
    try:
        from . import triton_fold  # noqa: F401
    except Exception as error:
        return f"Triton cannot be imported ({type(error).__name__}: {error})."
    return None


@functools.cache
def _tell_once(obstacle: str) -> None:
    logger.warning("Losses run on the chunked PyTorch path: %s", obstacle)
