"""Inputs for the core, its paths, and the loss of a case by each path and by the formula."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from deft_plugin import GatedLoss, Objective, gated_loss, linear_gated_loss

from .formulas import formula_losses

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_TRITON_RUNS = DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

# Paths of the core with tiles, those of `linear_gated_loss`, those that form gradients without autograd
# of the formula, and all. "logits" is `gated_loss` on the case's logits.
TILED_PATHS = ["chunked", *(["triton"] if _TRITON_RUNS else [])]
LINEAR_PATHS = ["reference", *TILED_PATHS]
FUSED_PATHS = [*TILED_PATHS, "logits"]
PATHS = ["reference", *FUSED_PATHS]

OBJECTIVES: list[tuple[str, dict[str, Any]]] = [
    ("nll", {}),
    ("p", {}),
    ("alpha", {}),
    ("alpha", {"a": 0.0}),
    ("alpha", {"a": 2.5}),
    ("dft", {}),
    ("eaft", {}),
    ("eaft", {"k": 3, "normalizer": 1.0, "exponent": 2.0}),
    ("eaft", {"entropy": "full", "exponent": 0.5}),
    ("cayley", {}),
    ("cayley_trans", {}),
    ("cayley_trans", {"scope": "fixed", "mean_probability": 0.6, "floor_coefficient": 0.9}),
    ("deft", {}),
]
with_objectives = pytest.mark.parametrize(
    ("name", "parameters"),
    [pytest.param(*objective, id=f"{objective[0]}-{objective[1]}") for objective in OBJECTIVES],
)


# Arguments of a case that may require gradients.
OPERANDS = ("hidden", "weight", "bias", "low_rank_hidden", "low_rank_weight")


@dataclass(frozen=True)
class Case:
    """Arguments of `linear_gated_loss`; tensors that require gradients are leaves."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    low_rank_hidden: Tensor | None = None
    low_rank_weight: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        tensors = (getattr(self, name) for name in OPERANDS)
        return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype, as leaves of their own."""

        def converted(tensor: Tensor | None) -> Any:
            if tensor is None:
                return None
            return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)

        return dataclasses.replace(
            self, **{name: converted(getattr(self, name)) for name in OPERANDS}
        )

    def logits(self) -> Tensor:
        """softcap(scale * (hidden @ weight.T + low rank + bias)), differentiable, in the case's dtype."""
        logits = self.hidden @ self.weight.T
        if self.low_rank_hidden is not None and self.low_rank_weight is not None:
            logits = logits + self.low_rank_hidden @ self.low_rank_weight.T
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def random_case(
    count: int = 24,
    vocab_size: int = 50,
    *,
    hidden_size: int = 8,
    rank: int = 0,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    masked_share: float = 0.0,
    logit_std: tuple[float, float] = (0.1, 10.0),
    trainable: Sequence[str] = OPERANDS,
    identity: bool = False,
    seed: int = 0,
) -> Case:
    """Random hidden states whose rows go from undecided to certain predictions, half of them right.

    Args:
        rank: columns of a low-rank addition to the weight; 0 for none.
        identity: make the weight the identity, so that hidden states are logits, without rounding.
        masked_share: share of the targets that hold ignore_index.
        logit_std: standard deviation of the first and of the last row's logits, roughly.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if identity:
        hidden_size = vocab_size
    spread = torch.logspace(*torch.tensor(logit_std).log10().tolist(), count, dtype=torch.float64)
    hidden = normal(count, hidden_size) * spread.unsqueeze(1)
    weight = normal(vocab_size, hidden_size) / hidden_size**0.5
    if identity:
        weight = torch.eye(vocab_size, dtype=torch.float64)
    low_rank_hidden = normal(count, rank) * spread.unsqueeze(1) if rank else None
    low_rank_weight = normal(vocab_size, rank) / rank**0.5 if rank else None
    targets = torch.randint(vocab_size, (count,), generator=generator)
    right = torch.rand(count, generator=generator) < 0.5
    case = Case(
        hidden=hidden,
        weight=weight,
        targets=targets,
        logit_scale=logit_scale,
        softcap=softcap,
        low_rank_hidden=low_rank_hidden,
        low_rank_weight=low_rank_weight,
    )
    linear = dataclasses.replace(case, logit_scale=1.0, softcap=None)
    targets = torch.where(right, linear.logits().argmax(1), targets)
    masked = torch.rand(count, generator=generator) < masked_share
    case = dataclasses.replace(
        case,
        targets=targets.masked_fill(masked, -100).to(DEVICE),
        bias=normal(vocab_size) if bias else None,
    )
    tensors = {
        name: tensor.to(DEVICE, dtype).requires_grad_(name in trainable)
        for name in OPERANDS
        if (tensor := getattr(case, name)) is not None
    }
    return dataclasses.replace(case, **tensors)


def gated(path: str, case: Case, objective: str | Objective = "deft", **options: Any) -> GatedLoss:
    """The case's loss by one path."""
    options.setdefault("ignore_index", case.ignore_index)
    if path == "logits":
        options.pop("tile_rows", None)
        return gated_loss(case.logits(), case.targets, objective, **options)
    low_rank = None
    if case.low_rank_hidden is not None and case.low_rank_weight is not None:
        low_rank = (case.low_rank_hidden, case.low_rank_weight)
    return linear_gated_loss(
        case.hidden,
        case.weight,
        case.targets,
        objective,
        bias=case.bias,
        low_rank=low_rank,
        logit_scale=case.logit_scale,
        softcap=case.softcap,
        path=path,  # type: ignore[arg-type]
        **options,
    )


def formula(case: Case, name: str, parameters: dict[str, Any]) -> Tensor:
    """Per-token losses by the formula, in the targets' shape, 0 where ignored."""
    mask = case.targets != case.ignore_index
    token_loss = formula_losses(case.logits()[mask], case.targets[mask], name, **parameters)
    return token_loss.new_zeros(mask.shape).masked_scatter(mask, token_loss)


def gradients(loss: Tensor, case: Case, **options: Any) -> list[Tensor]:
    """Of the case's leaves."""
    return list(torch.autograd.grad(loss, case.leaves(), **options))


def relative_error(actual: Tensor, expected: Tensor, smallest_norm: float = 0.0) -> float:
    """||actual - expected|| / max(||expected||, smallest_norm), in float64; 0 of 0 is no error."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = torch.linalg.vector_norm(actual - expected).item()
    norm = max(torch.linalg.vector_norm(expected).item(), smallest_norm)
    return difference / norm if norm else difference


def largest_error(
    actual: Sequence[Tensor], expected: Sequence[Tensor], smallest_norm: float = 0.0
) -> float:
    """The largest relative error of several tensors."""
    return max(relative_error(a, e, smallest_norm) for a, e in zip(actual, expected, strict=True))
