"""Who takes part in the benchmark of losses: the formulas on full logits, deft_plugin, the public fused losses, and
the matrix products, which any of them has to pay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import linear_gated_loss
from .contestant import HOPPER, Contestant, Loss, Needs
from .job import IGNORED
from .public_losses import PUBLIC_LOSSES

FORMULA = "formula on full logits"
OURS, OUR_NLL = "deft_plugin deft", "deft_plugin nll"
PRODUCTS = "matrix products alone"
# What the rest add takes a CPU too long to be measured unasked. TRL's head is what its users have without this package.
FEWER = (FORMULA, OURS, "torch cross_entropy", "TRL fused LM head")
PRODUCTS_TILE_BYTES = 2**30
QUACK = Needs(
    ("quack", "cutlass"),
    least_capability=HOPPER,
    dtypes=("bfloat16",),
    vocab_multiple=128,
    hidden_multiple=8,
)


def formula(objective: str) -> Loss:
    """An objective as one writes it with full logits in float32 (float64 for float64) and autograd."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        mask = targets != IGNORED
        logits = hidden @ weight.T
        logits = logits if logits.dtype == torch.float64 else logits.float()
        log_probabilities = torch.log_softmax(logits, dim=-1)
        log_p = log_probabilities.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        p = log_p.detach().exp()
        if objective == "nll":
            return _mean(-log_p, mask)
        if objective == "dft":
            return _mean(-p * log_p, mask)
        if objective == "deft":
            focus = log_probabilities.detach().exp().square().sum(-1)
        else:
            floor = 0.5 * _mean(p, mask)
            focus = (floor + (1 - floor) * p / (2 - p)).clamp(0.001, 1)
        return _mean(-torch.expm1(focus * log_p) / focus, mask)

    return loss


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum() / mask.sum()


def _compiled_formula() -> Loss:
    return torch.compile(formula("deft"))


def _ours(objective: str, needs: Needs = Needs(), remark: str = "", **options: Any) -> Contestant:
    """With options of `linear_gated_loss`; a path that cannot run everywhere says so in `needs`."""

    def build() -> Loss:
        return lambda hidden, weight, targets: (
            linear_gated_loss(hidden, weight, targets, objective, **options).loss
        )

    return Contestant(objective, build, needs, remark)


def _products_alone() -> Loss:
    """What any loss has to pay: the projection and the gradients' products, on tiles, and nothing else.

    Of the rows that count, and of a vocabulary rounded down to a multiple of 64: with another one torch takes a slow
    path that a loss need not take.
    """

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # A weight that requires a gradient says nothing under no_grad.
        return _Products.apply(hidden, weight, targets != IGNORED, torch.is_grad_enabled())

    return loss


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, mask: Tensor, training: bool) -> Tensor:
        counted = hidden if mask.all() else hidden[mask]
        vocab = weight.size(0) - weight.size(0) % 64 or weight.size(0)
        aligned = weight[:vocab]
        ctx.gradients = [
            torch.empty_like(tensor) if training and tensor.requires_grad else None
            for tensor in (hidden, weight)
        ]
        hidden_gradient, weight_gradient = ctx.gradients
        rows = max(1, PRODUCTS_TILE_BYTES // (vocab * hidden.element_size()))
        rows = rows - rows % 128 or rows
        buffer = hidden.new_empty(min(rows, counted.size(0)), vocab)
        for start in range(0, counted.size(0), rows):
            tile = counted[start : start + rows]
            logits = torch.mm(tile, aligned.T, out=buffer[: tile.size(0)])
            if hidden_gradient is not None:
                torch.mm(logits, aligned, out=hidden_gradient[start : start + tile.size(0)])
            if weight_gradient is not None:
                torch.mm(logits.T, tile, out=weight_gradient[:vocab])
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.gradients, None, None)


CONTESTANTS = {
    FORMULA: Contestant("deft", lambda: formula("deft")),
    "formula, torch.compile": Contestant("deft", _compiled_formula),
    OURS: _ours("deft"),
    "deft_plugin deft, entropy": _ours(
        "deft", remark="with each token's entropy, as TRL always asks for", with_entropy=True
    ),
    "deft_plugin deft, quack": _ours("deft", QUACK, path="quack"),
    "deft_plugin deft, skipping": _ours("deft", skip_below=2**-9),
    "deft_plugin cayley_trans": _ours(
        "cayley_trans", remark="with a call's own mean, which a trainer knows beforehand"
    ),
    OUR_NLL: _ours("nll"),
    "deft_plugin nll, quack": _ours("nll", QUACK, path="quack"),
    **PUBLIC_LOSSES,
    PRODUCTS: Contestant("", _products_alone),
}
