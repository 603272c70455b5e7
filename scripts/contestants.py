"""Who takes part in the benchmark of losses: deft_plugin, the formulas on full logits, and the public fused losses.

Each contestant is a function from (hidden, weight, targets) to a mean loss, with the objective that it computes,
for its error. One that cannot run here says why.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deft_plugin import linear_gated_loss
from deft_plugin.ops.availability import chooses_triton

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
FORMULA = "formula on full logits"


class UnavailableError(Exception):
    """A contestant cannot run here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """One loss.

    Attributes:
        objective: what it computes: "nll", "deft", "cayley_trans", "dft".
        build: makes the loss for a device type, or raises `UnavailableError`.
    """

    objective: str
    build: Callable[[str], Loss]


def formula(objective: str) -> Loss:
    """An objective as one writes it with full logits in float32 (float64 for float64) and autograd."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = hidden @ weight.T
        logits = logits if logits.dtype == torch.float64 else logits.float()
        log_probabilities = torch.log_softmax(logits, dim=-1)
        log_p = log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        p = log_p.detach().exp()
        if objective == "nll":
            return -log_p.mean()
        if objective == "dft":
            return -(p * log_p).mean()
        if objective == "deft":
            focus = log_probabilities.detach().exp().square().sum(-1)
        else:
            floor = 0.5 * p.mean()
            focus = (floor + (1 - floor) * p / (2 - p)).clamp(0.001, 1)
        return (-torch.expm1(focus * log_p) / focus).mean()

    return loss


def _ours(objective: str, **options: Any) -> Contestant:
    def build(device: str) -> Loss:
        try:
            chooses_triton(options.get("path", "auto"), torch.device(device))
        except ValueError as error:
            raise UnavailableError(str(error)) from None
        return lambda hidden, weight, targets: (
            linear_gated_loss(hidden, weight, targets, objective, **options).loss
        )

    return Contestant(objective, build)


def _compiled_formula(device: str) -> Loss:
    return torch.compile(formula("deft"))


def _torch_cross_entropy(device: str) -> Loss:
    return lambda hidden, weight, targets: functional.cross_entropy(
        (hidden @ weight.T).float(), targets
    )


def _torch_linear_cross_entropy(device: str) -> Loss:
    if not hasattr(functional, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: functional.linear_cross_entropy(
        hidden, weight, targets, options=options
    )


def _trl(device: str) -> Loss:
    _require("trl")
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError:
        raise UnavailableError("this TRL has no fused LM head (1.15 and later have)") from None
    # TRL's own call for a model without softcap or scale: temperature, chunk, softcap, scale, outputs.
    options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        log_probs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, *options)[0]
        return -log_probs.mean()

    return loss


def _liger(use_token_scaling: bool) -> Contestant:
    def build(device: str) -> Loss:
        _require("liger_kernel", "liger-kernel")
        _require_gpu(device)
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        module = LigerFusedLinearCrossEntropyLoss(use_token_scaling=use_token_scaling)
        return lambda hidden, weight, targets: module(weight, hidden, targets)

    return Contestant("dft" if use_token_scaling else "nll", build)


def _cut_cross_entropy(device: str) -> Loss:
    _require("cut_cross_entropy", "cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy

    implementation = "torch_compile" if device == "cpu" else "cce"
    return lambda hidden, weight, targets: linear_cross_entropy(
        hidden, weight, targets, impl=implementation
    )


def _quack(device: str) -> Loss:
    _require("quack", "quack-kernels")
    _require_gpu(device)
    if torch.cuda.get_device_capability()[0] < 9:
        raise UnavailableError("quack-kernels needs a Hopper GPU or a later one")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, targets: chunked_linear_cross_entropy(hidden, weight, targets)


def _products_alone(device: str) -> Loss:
    """What any loss has to pay: the projection and the gradients' products, on tiles, and nothing else."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return _Products.apply(hidden, weight)

    return loss


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, hidden: Tensor, weight: Tensor) -> Tensor:
        rows = max(1, 2**30 // (weight.size(0) * hidden.element_size()))
        buffer = hidden.new_empty(min(rows, hidden.size(0)), weight.size(0))
        ctx.gradients = [torch.empty_like(hidden) if hidden.requires_grad else None, None]  # type: ignore[attr-defined]
        for start in range(0, hidden.size(0), rows):
            tile = hidden[start : start + rows]
            logits = torch.mm(tile, weight.T, out=buffer[: tile.size(0)])
            if hidden.requires_grad:
                torch.mm(logits, weight, out=ctx.gradients[0][start : start + rows])  # type: ignore[attr-defined]
            if weight.requires_grad:
                product = logits.T @ tile
                ctx.gradients[1] = product  # type: ignore[attr-defined]
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: object, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(ctx.gradients)  # type: ignore[attr-defined]


def _require(module: str, package: str | None = None) -> None:
    if importlib.util.find_spec(module) is None:
        raise UnavailableError(f"{package or module} is not installed")


def _require_gpu(device: str) -> None:
    if device == "cpu":
        raise UnavailableError("it needs a GPU")


CONTESTANTS = {
    FORMULA: Contestant("deft", lambda device: formula("deft")),
    "formula, torch.compile": Contestant("deft", _compiled_formula),
    "deft_plugin deft": _ours("deft"),
    "deft_plugin deft, skipping": _ours("deft", skip_below=2**-12),
    "deft_plugin deft, quack": _ours("deft", path="quack"),
    "deft_plugin cayley_trans": _ours("cayley_trans"),
    "deft_plugin nll": _ours("nll"),
    "deft_plugin nll, quack": _ours("nll", path="quack"),
    "torch cross_entropy": Contestant("nll", _torch_cross_entropy),
    "torch linear_cross_entropy": Contestant("nll", _torch_linear_cross_entropy),
    "TRL fused LM head": Contestant("nll", _trl),
    "Liger FLCE": _liger(use_token_scaling=False),
    "Liger FLCE, token scaling": _liger(use_token_scaling=True),
    "cut-cross-entropy": Contestant("nll", _cut_cross_entropy),
    "quack-kernels": Contestant("nll", _quack),
    "matrix products alone": Contestant("", _products_alone),
}
