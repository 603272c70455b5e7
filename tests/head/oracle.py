"""What the gated head has to equal: the formula on logits that the model itself has built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deft_plugin import add_gated_head

from ..ops.formulas import formula_losses

Batch = dict[str, Tensor]


def make_batch(rows: int = 3, length: int = 12, seed: int = 0) -> Batch:
    """Random ids with prompts of unequal lengths without labels, the second row padded."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 100, (rows, length), generator=generator)
    labels = input_ids.clone()
    for row in range(rows):
        labels[row, : 2 * row + 1] = -100
    attention_mask = torch.ones_like(input_ids)
    labels[1, -3:], attention_mask[1, -3:] = -100, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def without_labels(batch: Batch) -> Batch:
    """The batch as it is given to a model that shall build logits."""
    return {name: value for name, value in batch.items() if name != "labels"}


def formula_loss(model: nn.Module, batch: Batch, name: str = "deft", **parameters: Any) -> Tensor:
    """Mean of the objective over the batch's labels in float64, with a mixture's auxiliary loss."""
    output = model(**without_labels(batch))
    logits, targets = output.logits, batch["labels"]
    # Prompt tuning puts virtual tokens in front.
    logits = logits[:, logits.size(1) - targets.size(1) :]
    scored = targets[:, 1:] != -100
    loss = formula_losses(
        logits[:, :-1][scored].double(), targets[:, 1:][scored], name, **parameters
    ).mean()
    if getattr(output, "aux_loss", None) is not None:
        loss = loss + model.config.router_aux_loss_coef * output.aux_loss
    return loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter that trains, zero where the loss does not depend on it."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if value is None else value
        for (name, parameter), value in zip(parameters.items(), values, strict=True)
    }


def assert_same_gradients(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """Compare parameter by parameter; `tolerance` is relative to the parameter's largest gradient."""
    assert actual.keys() == expected.keys()
    assert any(value.any() for value in expected.values())
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance * scale, msg=name)


def assert_like_formula(
    model: PreTrainedModel,
    expected_loss: Tensor,
    expected_gradients: dict[str, Tensor],
    batch: Batch,
    tolerance: float = 1e-9,
) -> None:
    """Loss and all gradients of the gated `model` on `batch`."""
    loss = model(**batch).loss
    torch.testing.assert_close(loss.double(), expected_loss.double(), rtol=tolerance, atol=0)
    assert_same_gradients(gradients(model, loss), expected_gradients, tolerance)


def assert_equals_formula(model: Any, batch: Batch, objective: str = "deft") -> None:
    """Put a head on the model, and compare with the formula on the logits that it built before."""
    loss = formula_loss(model, batch, objective)
    expected = gradients(model, loss)
    add_gated_head(model, objective)
    assert_like_formula(model, loss, expected, batch)
