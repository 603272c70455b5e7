"""One update of SGD does not depend on how its rows are split into micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import (
    DEVICE,
    OBJECTIVES,
    Case,
    formula,
    gated,
    largest_error,
)

ROWS, LENGTH, INPUT_SIZE, HIDDEN_SIZE, VOCAB_SIZE = 8, 10, 6, 5, 30
SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]
COUPLED = [("cayley_trans", {})]
INDEPENDENT = [objective for objective in OBJECTIVES if objective not in COUPLED]
LEARNING_RATE = 0.5


def batch() -> tuple[Tensor, Tensor]:
    """Inputs (ROWS, LENGTH, INPUT_SIZE) and targets (ROWS, LENGTH), of which row i has 1 + i."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, LENGTH, INPUT_SIZE, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB_SIZE, (ROWS, LENGTH), generator=generator)
    masked = torch.arange(LENGTH) > torch.arange(ROWS).unsqueeze(1)
    return inputs.to(DEVICE), targets.masked_fill(masked, -100).to(DEVICE)


def model() -> list[Tensor]:
    """Weights of a layer and of the lm_head."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(INPUT_SIZE, HIDDEN_SIZE), (VOCAB_SIZE, HIDDEN_SIZE)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
        for shape in shapes
    ]


def update(path: str, name: str, parameters: dict[str, Any], batch_size: int) -> list[Tensor]:
    """How far one step over all rows, `batch_size` at a time, moves the weights."""
    inputs, targets = batch()
    layer, lm_head = model()
    optimizer = torch.optim.SGD([layer, lm_head], lr=LEARNING_RATE)
    num_items_in_batch = (targets != -100).sum()
    for micro_inputs, micro_targets in zip(
        inputs.split(batch_size), targets.split(batch_size), strict=True
    ):
        case = Case((micro_inputs @ layer).tanh(), lm_head, micro_targets)
        result = gated(
            path, case, name, parameters=parameters, num_items_in_batch=num_items_in_batch
        )
        result.loss.backward()
    optimizer.step()
    return [after - before for after, before in zip([layer, lm_head], model(), strict=True)]


def update_by_the_formula(name: str, parameters: dict[str, Any]) -> list[Tensor]:
    inputs, targets = batch()
    layer, lm_head = model()
    case = Case((inputs.flatten(0, 1) @ layer).tanh(), lm_head, targets.flatten())
    loss = formula(case, name, parameters).sum() / (targets != -100).sum()
    return [-LEARNING_RATE * gradient for gradient in torch.autograd.grad(loss, [layer, lm_head])]


@pytest.mark.parametrize("path", ["chunked", "logits"])
@pytest.mark.parametrize(("batch_size", "accumulation"), SPLITS)
@pytest.mark.parametrize(("name", "parameters"), INDEPENDENT)
def test_the_update_is_that_of_the_formula_over_the_whole_batch(
    path: str, batch_size: int, accumulation: int, name: str, parameters: dict[str, Any]
) -> None:
    assert batch_size * accumulation == ROWS
    expected = update_by_the_formula(name, parameters)
    assert largest_error(update(path, name, parameters, batch_size), expected) < 1e-10


@pytest.mark.parametrize("path", ["chunked", "logits"])
@pytest.mark.parametrize(("name", "parameters"), COUPLED)
def test_an_objective_that_couples_tokens_depends_on_the_split(
    path: str, name: str, parameters: dict[str, Any]
) -> None:
    expected = update_by_the_formula(name, parameters)
    assert largest_error(update(path, name, parameters, ROWS), expected) < 1e-10
    assert largest_error(update(path, name, parameters, 1), expected) > 1e-2
