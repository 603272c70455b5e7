"""What computes the tiles: Triton is chosen on a GPU or forced by name, and its absence told once; QuACK is only asked for."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os

import torch
from packaging.specifiers import SpecifierSet

from .projection import LogitsTransform, Operands
from .sums import StatisticsRequest

logger = logging.getLogger("deft_plugin")

TRITON_DEVICES = ("cuda", "xpu")  # ROCm's device type is "cuda" too.
QUACK_CAPABILITIES = (9, 10)  # Hopper and Blackwell for data centres.
QUACK_VERSIONS = ">=0.6.5,<0.7"  # Whose inner parts are used; as in the extra.
# Rows of QuACK's tile over the vocabulary, and elements of bfloat16 in the 16 bytes that its copies are aligned to.
QUACK_VOCABULARY_MULTIPLE = 128
QUACK_HIDDEN_MULTIPLE = 8
QUACK_ALIGNMENT = 16


def resolve_path(path: str, device: torch.device) -> str:
    """`path`, or what "auto" means on `device`.

    Raises:
        ValueError: path is "triton" or "quack", and it cannot run there; the message says why.
    """
    if path == "quack":
        _refuse_quack(_quack_obstacles(device))
    if path == "triton" and (obstacle := _obstacle(device.type)):
        raise ValueError(f"path='triton' cannot run: {obstacle} Use 'auto' or 'chunked'.")
    if path != "auto":
        return path
    if device.type not in TRITON_DEVICES:
        return "chunked"
    obstacle = _obstacle(device.type)
    if obstacle:
        _tell_once(obstacle)
    return "chunked" if obstacle else "triton"


def refuse_where_quack_cannot(
    operands: Operands,
    transform: LogitsTransform,
    request: StatisticsRequest,
    product_dtype: torch.dtype,
) -> None:
    """Raise `ValueError` with all that keeps path "quack" from this lm_head, and the way out."""
    weight = operands.weight
    vocab_size, hidden_size = weight.shape
    machine = _quack_obstacles(weight.device)
    obstacles = list(machine)
    if product_dtype != torch.bfloat16:
        obstacles.append(f"it multiplies in bfloat16, and hidden @ weight.T is in {product_dtype}")
    if operands.bias is not None:
        obstacles.append("lm_head has a bias")
    if operands.low_rank_weight is not None:
        obstacles.append("lm_head has a low-rank addition (LoRA)")
    if transform != LogitsTransform():
        obstacles.append(
            f"logits are transformed: logit_scale={transform.scale}, softcap={transform.softcap}"
        )
    if request.top_k is not None:
        obstacles.append(f"the objective needs the {request.top_k} largest logits")
    if vocab_size % QUACK_VOCABULARY_MULTIPLE:
        obstacles.append(
            f"the vocabulary's size, {vocab_size}, is no multiple of {QUACK_VOCABULARY_MULTIPLE}"
        )
    if hidden_size % QUACK_HIDDEN_MULTIPLE:
        obstacles.append(
            f"the hidden size, {hidden_size}, is no multiple of {QUACK_HIDDEN_MULTIPLE}"
        )
    if not weight.is_contiguous():
        obstacles.append(f"weight is not contiguous; its strides are {weight.stride()}")
    # Where it cannot run anyway, the weight may lie in a checkpoint's file still.
    if not machine and weight.data_ptr() % QUACK_ALIGNMENT:
        obstacles.append(f"weight does not begin at a multiple of {QUACK_ALIGNMENT} bytes")
    _refuse_quack(obstacles)


def _refuse_quack(obstacles: list[str]) -> None:
    if obstacles:
        raise ValueError(
            f"path='quack' cannot run: {'; '.join(obstacles)}. Use 'auto', or another path that runs here."
        )


def _quack_obstacles(device: torch.device) -> list[str]:
    """Of the machine, apart from the lm_head."""
    obstacles = []
    if device.type != "cuda" or torch.version.hip is not None:
        obstacles.append(f"{device.type!r} is no NVIDIA GPU")
    elif torch.cuda.get_device_capability(device)[0] not in QUACK_CAPABILITIES:
        major, minor = torch.cuda.get_device_capability(device)
        obstacles.append(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and it is for 9.x and 10.x"
        )
    package = _quack_package()
    return [*obstacles, package] if package else obstacles


@functools.cache
def _quack_package() -> str | None:
    try:
        version = importlib.metadata.version("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "quack-kernels is not installed; it comes with the extra 'quack'"
    if version not in SpecifierSet(QUACK_VERSIONS):
        return (
            f"quack-kernels is {version}, and it needs {QUACK_VERSIONS}, whose inner parts it uses"
        )
    try:
        from . import quack_kernels  # noqa: F401
    except Exception as error:
        return f"quack-kernels cannot be imported ({type(error).__name__}: {error})"
    return None


def _obstacle(device_type: str) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device_type not in TRITON_DEVICES and not interpreted:
        return (
            f"a tensor on {device_type!r} is not on a GPU (and TRITON_INTERPRET=1, which runs kernels "
            "in Triton's interpreter, is not set)."
        )
    return _triton_package()


@functools.cache
def _triton_package() -> str | None:
    try:
        from . import triton_fold  # noqa: F401
    except Exception as error:
        return f"Triton cannot be imported ({type(error).__name__}: {error})."
    return None


@functools.cache
def _tell_once(obstacle: str) -> None:
    logger.warning("Losses run on the chunked PyTorch path: %s", obstacle)
