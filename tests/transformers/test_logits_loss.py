"""`LogitsLoss` scores position i with label i + 1; tests/head has it in a Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from deft_plugin import LogitsLoss
from tests.ops.cases import OBJECTIVES, relative_error
from tests.ops.formulas import formula_losses

VOCAB_SIZE = 9


def outputs_and_labels() -> tuple[Tensor, Tensor]:
    """Logits (3, 5, V), a leaf, and labels (3, 5) with masked prompts and padding."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 5, VOCAB_SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB_SIZE, (3, 5), generator=generator)
    labels[1, :3] = -100
    labels[2, 4:] = -100
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("num_items_in_batch", [None, 17, torch.tensor(17)])
@pytest.mark.parametrize(("name", "parameters"), OBJECTIVES)
def test_the_loss_is_that_of_the_next_token(
    name: str, parameters: dict[str, Any], num_items_in_batch: int | Tensor | None
) -> None:
    logits, labels = outputs_and_labels()
    shifted = labels[:, 1:]
    valid = shifted != -100
    losses = formula_losses(logits[:, :-1][valid], shifted[valid], name, **parameters)
    expected = losses.sum() / (valid.sum() if num_items_in_batch is None else num_items_in_batch)

    loss = LogitsLoss(name, **parameters)(
        CausalLMOutput(logits=logits), labels, num_items_in_batch=num_items_in_batch
    )
    assert relative_error(loss, expected) < 1e-10
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert relative_error(gradient, expected_gradient) < 1e-10


def test_a_batch_without_labels_has_a_loss_of_zero_with_a_backward() -> None:
    logits, labels = outputs_and_labels()
    # The first label of a row is never scored.
    labels[:, 1:] = -100
    loss = LogitsLoss()({"logits": logits}, labels)
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_outputs_as_a_tuple_have_the_same_loss() -> None:
    logits, labels = outputs_and_labels()
    named = LogitsLoss()(CausalLMOutput(logits=logits), labels)
    assert LogitsLoss()((logits, "past_key_values"), labels) == named


def test_labels_that_were_cut_before_they_are_shifted_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = {"logits": torch.randn(1, 4, 8)}, torch.tensor([[1, 2, 3, 4]])
    LogitsLoss()(*batch)
    monkeypatch.setitem(
        AcceleratorState._shared_state, "parallelism_config", ParallelismConfig(cp_size=2)
    )
    with pytest.raises(ValueError, match=r"context parallelism .*add_gated_head.*cp_size=1"):
        LogitsLoss()(*batch)
