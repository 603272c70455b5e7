"""A low-rank addition to the weight, such as LoRA, has the loss and the gradients of the formula with it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from deft_plugin import linear_gated_loss

from .cases import (
    DEVICE,
    LINEAR_PATHS,
    OPERANDS,
    TILED_PATHS,
    Case,
    formula,
    gated,
    gradients,
    largest_error,
    random_case,
    relative_error,
    with_objectives,
)
from .formulas import formula_losses

# What LoRA on an lm_head trains: the rest of the model, lora_A and lora_B.
LORA = ("hidden", "low_rank_hidden", "low_rank_weight")


def unequal(losses: Tensor) -> Tensor:
    """A sum of the losses with another upstream gradient for each of them, of both signs."""
    return (losses * torch.linspace(-1, 2, losses.numel(), device=losses.device)).sum()


@pytest.mark.parametrize("path", LINEAR_PATHS)
@with_objectives
def test_gradients_equal_autograd_of_the_formula(
    path: str, name: str, parameters: dict[str, Any]
) -> None:
    case = random_case(
        12,
        40,
        rank=3,
        bias=True,
        logit_scale=0.8,
        softcap=15.0,
        masked_share=0.25,
        logit_std=(0.1, 20),
        trainable=LORA,
    )
    expected = formula(case, name, parameters)
    result = gated(path, case, name, parameters=parameters, tile_rows=5)
    assert relative_error(result.token_loss, expected) < 1e-10
    for total in (torch.sum, unequal):
        actual = gradients(total(result.token_loss), case, retain_graph=True)
        exact = gradients(total(expected), case, retain_graph=True)
        assert largest_error(actual, exact) < 1e-10


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
@pytest.mark.parametrize(
    "trainable",
    [names for size in range(1, 6) for names in itertools.combinations(OPERANDS, size)],
    ids="-".join,
)
def test_each_operand_has_its_gradient_whatever_else_is_frozen(
    path: str, name: str, trainable: tuple[str, ...]
) -> None:
    case = random_case(9, 30, rank=3, bias=True, masked_share=0.2, trainable=trainable)
    expected = formula(case, name, {})
    result = gated(path, case, name, tile_rows=4)
    for total in (torch.sum, unequal):
        actual = gradients(total(result.token_loss), case, retain_graph=True)
        exact = gradients(total(expected), case, retain_graph=True)
        assert largest_error(actual, exact) < 1e-10
    result.loss.backward()
    for operand in OPERANDS:
        assert (getattr(case, operand).grad is not None) == (operand in trainable)


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("name", ["nll", "deft", "cayley_trans", "eaft"])
def test_lora_with_dropout_trains_both_matrices_of_every_adapter(path: str, name: str) -> None:
    """The logits are h W^T + sum of s dropout(h) A^T B^T, which autograd of the formula differentiates."""
    batch, length, vocab_size, hidden_size = 3, 7, 40, 8
    base = random_case(batch * length, vocab_size, hidden_size=hidden_size, trainable=["hidden"])
    hidden = base.hidden.detach().unflatten(0, (batch, length)).requires_grad_()
    targets = base.targets.unflatten(0, (batch, length))
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) / 3
        return values.to(DEVICE).requires_grad_()

    # The second scaled as rsLoRA does, by alpha / sqrt(r).
    adapters = [
        (normal(3, hidden_size), normal(vocab_size, 3), 16 / 3),
        (normal(2, hidden_size), normal(vocab_size, 2), 16 / 2**0.5),
    ]
    kept = torch.rand(2, *hidden.shape, generator=generator, dtype=torch.float64) > 0.3
    dropped = [hidden * mask.to(DEVICE) / 0.7 for mask in kept]

    logits = hidden @ base.weight.T
    for (down, up, scaling), rows in zip(adapters, dropped, strict=True):
        logits = logits + scaling * (rows @ down.T) @ up.T
    expected = formula_losses(logits.flatten(0, 1), targets.flatten(), name).view(targets.shape)

    low_rank_hidden = torch.cat(
        [
            scaling * rows @ down.T
            for (down, _, scaling), rows in zip(adapters, dropped, strict=True)
        ],
        dim=-1,
    )
    low_rank_weight = torch.cat([up for _, up, _ in adapters], dim=1)
    result = linear_gated_loss(
        hidden,
        base.weight,
        targets,
        name,
        low_rank=(low_rank_hidden, low_rank_weight),
        path=path,  # type: ignore[arg-type]
        tile_rows=5,
    )
    assert relative_error(result.token_loss, expected) < 1e-10
    leaves = [hidden, *(matrix for down, up, _ in adapters for matrix in (down, up))]
    for total in (torch.mean, unequal):
        actual = torch.autograd.grad(total(result.token_loss.flatten()), leaves, retain_graph=True)
        exact = torch.autograd.grad(total(expected.flatten()), leaves, retain_graph=True)
        assert largest_error(actual, exact) < 1e-10


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
def test_an_adapter_at_its_start_changes_no_loss_and_learns(path: str, name: str) -> None:
    """LoRA starts with B = 0."""
    case = random_case(9, 30, rank=3, trainable=LORA)
    assert case.low_rank_weight is not None
    case.low_rank_weight.data.zero_()
    base = dataclasses.replace(case, low_rank_hidden=None, low_rank_weight=None)
    result, expected = gated(path, case, name), gated(path, base, name)
    assert torch.equal(result.token_loss, expected.token_loss)
    hidden, low_rank_hidden, low_rank_weight = gradients(result.loss, case)
    assert relative_error(hidden, gradients(expected.loss, base)[0]) < 1e-14
    assert (low_rank_hidden == 0).all()
    exact = gradients(formula(case, name, {}).mean(), case)[2]
    assert relative_error(low_rank_weight, exact) < 1e-10
    assert exact.norm() > 1e-3


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
def test_a_low_rank_is_the_same_as_more_columns_of_weight(path: str, name: str) -> None:
    case = random_case(9, 30, rank=3, masked_share=0.2)
    assert case.low_rank_hidden is not None
    assert case.low_rank_weight is not None
    wide = Case(
        hidden=torch.cat([case.hidden, case.low_rank_hidden], 1),
        weight=torch.cat([case.weight, case.low_rank_weight], 1),
        targets=case.targets,
    )
    result, expected = gated(path, case, name), gated(path, wide, name)
    assert relative_error(result.token_loss, expected.token_loss) < 1e-12
    for total in (torch.sum, unequal):
        actual = gradients(total(result.token_loss), case, retain_graph=True)
        exact = gradients(total(expected.token_loss), case, retain_graph=True)
        assert largest_error(actual, exact) < 1e-12


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize(("count", "masked_share"), [(0, 0.0), (5, 1.0)], ids=["none", "masked"])
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
def test_without_a_valid_token_gradients_are_zero(
    path: str, count: int, masked_share: float, name: str
) -> None:
    case = random_case(count, 7, rank=2, masked_share=masked_share)
    result = gated(path, case, name)
    total = result.loss + unequal(result.token_loss)
    assert total == 0
    for gradient, leaf in zip(gradients(total, case), case.leaves(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
def test_what_is_skipped_is_small(path: str, name: str) -> None:
    case = random_case(64, 40, rank=3, logit_std=(1.0, 300.0), masked_share=0.2, trainable=LORA)
    right = case.logits().detach().argmax(1)
    settled = (case.targets != -100) & (torch.arange(64, device=DEVICE) >= 20)
    case = dataclasses.replace(case, targets=torch.where(settled, right, case.targets))
    exact = gated(path, case, name)
    result = gated(path, case, name, skip_below=2**-7, tile_rows=16)
    assert result.skipped is not None
    rows = result.skipped == 1
    assert rows.sum() >= 8
    assert ((result.skipped > 0) & (result.skipped < 1)).any()
    actual = gradients(result.loss, case)
    assert (actual[1][rows] == 0).all()
    assert largest_error(actual, gradients(exact.loss, case)) < 2**-4


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "autocast", "largest_std", "tolerance"),
    [
        (torch.float32, torch.float32, None, 10.0, 1e-5),
        (torch.bfloat16, torch.bfloat16, None, 1.0, 1e-2),
        (torch.float16, torch.float16, None, 10.0, 1e-2),
        # PEFT keeps adapters of a model in half precision in float32.
        (torch.bfloat16, torch.float32, None, 1.0, 1e-2),
        (torch.float32, torch.float32, torch.bfloat16, 1.0, 1e-2),
        (torch.bfloat16, torch.float32, torch.bfloat16, 1.0, 1e-2),
        (torch.float32, torch.bfloat16, None, 1.0, 1e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
def test_loss_and_gradients_are_accurate(
    path: str,
    name: str,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    autocast: torch.dtype | None,
    largest_std: float,
    tolerance: float,
) -> None:
    # float16 needs the loss scaling that it is trained with.
    loss_scale = 4096.0 if torch.float16 in (dtype, autocast) else 1.0
    case = random_case(24, 500, hidden_size=16, rank=4, logit_std=(0.1, largest_std))
    adapter = case.to(adapter_dtype)
    case = dataclasses.replace(
        case.to(dtype),
        low_rank_hidden=adapter.low_rank_hidden,
        low_rank_weight=adapter.low_rank_weight,
    )
    exact = case.to(torch.float64)
    expected = formula(exact, name, {})
    with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
        result = gated(path, case, name)
    assert result.loss.dtype == result.token_loss.dtype == torch.float32
    assert relative_error(result.token_loss, expected) < tolerance
    for loss, exact_loss in (
        (result.loss, expected.mean()),
        (result.token_loss[:20].sum(), expected[:20].sum()),
    ):
        actual = gradients(loss_scale * loss, case, retain_graph=True)
        assert [gradient.dtype for gradient in actual] == [leaf.dtype for leaf in case.leaves()]
        scaled = [gradient.double() / loss_scale for gradient in actual]
        assert largest_error(scaled, gradients(exact_loss, exact, retain_graph=True)) < tolerance


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
def test_an_evaluation_gives_the_same_figures_without_a_graph(path: str, name: str) -> None:
    case = random_case(9, 12, rank=3, masked_share=0.2)
    training = gated(path, case, name)
    with torch.no_grad():
        evaluation = gated(path, case, name)
    assert not evaluation.loss.requires_grad
    torch.testing.assert_close(
        evaluation.token_loss, training.token_loss.detach(), rtol=1e-14, atol=0
    )
