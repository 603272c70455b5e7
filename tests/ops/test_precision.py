"""Errors of float32 (below 1e-5), bfloat16 and float16 (below 1e-2) against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deft_plugin import linear_gated_loss

from .cases import (
    DEVICE,
    FUSED_PATHS,
    LINEAR_PATHS,
    OBJECTIVES,
    PATHS,
    TILED_PATHS,
    formula,
    gated,
    gradients,
    largest_error,
    random_case,
    relative_error,
    with_objectives,
)

LARGE_VOCAB_SIZE = 262_144

# A bfloat16 logit of size z is off by up to z / 256, in any implementation: so logits of size 1. float16
# needs some open gates and the loss scaling that it is trained with, or all gradients are too small for it.
DTYPES = pytest.mark.parametrize(
    ("dtype", "largest_std", "loss_scale", "tolerance"),
    [
        pytest.param(torch.float32, 10.0, 1.0, 1e-5, id="float32"),
        pytest.param(torch.bfloat16, 1.0, 1.0, 1e-2, id="bfloat16"),
        pytest.param(torch.float16, 10.0, 4096.0, 1e-2, id="float16"),
    ],
)


@DTYPES
@pytest.mark.parametrize("path", PATHS)
@with_objectives
def test_loss_and_gradients_are_accurate(
    path: str,
    name: str,
    parameters: dict[str, Any],
    dtype: torch.dtype,
    largest_std: float,
    loss_scale: float,
    tolerance: float,
) -> None:
    case = random_case(
        24, 500, hidden_size=16, bias=True, masked_share=0.2, logit_std=(0.1, largest_std)
    ).to(dtype)
    _assert_accurate(path, case, name, parameters, loss_scale, tolerance)


@DTYPES
@pytest.mark.parametrize("path", FUSED_PATHS)
@pytest.mark.parametrize(
    ("name", "parameters"), [("deft", {}), ("eaft", {"entropy": "full"})], ids=["deft", "eaft"]
)
def test_loss_and_gradients_are_accurate_over_a_large_vocabulary(
    path: str,
    name: str,
    parameters: dict[str, Any],
    dtype: torch.dtype,
    largest_std: float,
    loss_scale: float,
    tolerance: float,
) -> None:
    case = random_case(
        8, LARGE_VOCAB_SIZE, hidden_size=16, logit_std=(0.1, largest_std / 2), masked_share=0.2
    ).to(dtype)
    _assert_accurate(path, case, name, parameters, loss_scale, tolerance)


def _assert_accurate(
    path: str, case: Any, name: str, parameters: dict[str, Any], loss_scale: float, tolerance: float
) -> None:
    exact = case.to(torch.float64)
    expected = formula(exact, name, parameters)
    expected_loss = expected.sum() / (case.targets != -100).sum()
    result = gated(path, case, name, parameters=parameters)

    assert result.loss.dtype == result.token_loss.dtype == result.gate.dtype == torch.float32
    assert relative_error(result.token_loss, expected) < tolerance
    assert relative_error(result.loss, expected_loss) < tolerance
    actual = [g.double() / loss_scale for g in gradients(loss_scale * result.loss, case)]
    assert largest_error(actual, gradients(expected_loss, exact)) < tolerance


@pytest.mark.parametrize("path", FUSED_PATHS)
@pytest.mark.parametrize(
    ("name", "parameters"), [(name, p) for name, p in OBJECTIVES if name != "eaft"]
)
def test_every_token_has_an_accurate_float32_gradient_however_sure_the_model_is(
    path: str, name: str, parameters: dict[str, Any]
) -> None:
    case = random_case(
        32, 300, identity=True, trainable=["hidden"], logit_std=(0.1, 30), dtype=torch.float32
    )
    exact = case.to(torch.float64)
    (actual,) = gradients(gated(path, case, name, parameters=parameters).loss, case)
    (expected,) = gradients(formula(exact, name, parameters).mean(), exact)
    sizes = expected.abs().amax(1)
    assert (sizes < 1e-8).any(), "some of the tokens should be all but certain"
    for row in (sizes > 1e-30).nonzero().flatten():
        # Exponentials of a GPU have three bits less.
        assert relative_error(actual[row], expected[row]) < (1e-5 if DEVICE.type == "cpu" else 3e-5)


@pytest.mark.parametrize("path", FUSED_PATHS)
@pytest.mark.parametrize("entropy", ["top_k", "full"])
def test_an_entropy_has_a_small_absolute_error_however_sure_the_model_is(
    path: str, entropy: str
) -> None:
    """A relative one it has not: p = 1 - 1e-9 rounds to 1 in float32, and -p log p to 0."""
    case = random_case(32, 300, identity=True, logit_std=(0.1, 30), dtype=torch.float32)
    exact = gated(path, case.to(torch.float64), "eaft", parameters={"entropy": entropy})
    result = gated(path, case, "eaft", parameters={"entropy": entropy})
    assert (exact.gate < 1e-5).any()
    torch.testing.assert_close(result.gate.double(), exact.gate, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("path", FUSED_PATHS)
def test_statistics_over_a_large_vocabulary_are_accurate_for_every_token(path: str) -> None:
    case = random_case(
        10, LARGE_VOCAB_SIZE, hidden_size=1, dtype=torch.float32, logit_std=(0.1, 10), trainable=[]
    )
    result = gated(path, case, "deft", with_entropy=True)
    log_p_all = case.logits().double().log_softmax(1)
    p_all = log_p_all.exp()
    p_all[torch.arange(10), case.targets] = 0
    others = p_all.sum(1)
    log_p = log_p_all.gather(1, case.targets.unsqueeze(1)).squeeze(1)
    log_p = torch.where(others < 0.5, torch.log1p(-others), log_p)
    collision = (2 * log_p_all).exp().sum(1)
    torch.testing.assert_close(result.log_p.double(), log_p, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.focus.double(), collision, rtol=1e-5, atol=0)
    entropy = torch.special.entr(log_p_all.exp()).sum(1)
    torch.testing.assert_close(result.entropy.double(), entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_dtype_and_returns_float32(
    path: str, name: str, dtype: torch.dtype
) -> None:
    case = random_case(
        12, 200, hidden_size=16, dtype=torch.float32, bias=True, logit_std=(0.1, 1.0)
    )
    with torch.autocast(case.hidden.device.type, dtype):
        result = gated(path, case, name)
        whole = gated(path, case.to(torch.float64), name)
    expected = gated(path, case.to(dtype).to(torch.float32), name)
    unrounded = gated(path, case, name)

    assert result.loss.dtype == torch.float32
    assert whole.loss.dtype == torch.float64, "autocast leaves float64 alone"
    actual = gradients(4096 * result.loss, case)
    assert {gradient.dtype for gradient in actual} == {torch.float32}
    assert largest_error(actual, gradients(4096 * unrounded.loss, case)) < 1e-2
    # In the autocast dtype indeed: the float32 result is further away than rounding leaves it.
    assert result.log_p.ne(unrounded.log_p).any()
    assert relative_error(result.log_p, expected.log_p) < 1e-2


@pytest.mark.parametrize("path", LINEAR_PATHS)
def test_mixed_dtypes_are_promoted(path: str) -> None:
    case = random_case(8, 20, dtype=torch.float32, bias=True)
    mixed = type(case)(
        hidden=case.hidden.detach().bfloat16().requires_grad_(),
        weight=case.weight,
        bias=case.bias.detach().double(),
        targets=case.targets,
    )
    promoted = type(case)(
        hidden=mixed.hidden.detach().float().requires_grad_(),
        weight=case.weight,
        bias=case.bias.detach(),
        targets=case.targets,
    )
    result, expected = gated(path, mixed), gated(path, promoted)
    assert result.loss.dtype == torch.float32
    assert relative_error(result.token_loss, expected.token_loss) < 1e-6
    actual, wanted = gradients(result.loss, mixed), gradients(expected.loss, promoted)
    assert [gradient.dtype for gradient in actual] == [torch.bfloat16, torch.float32]
    assert relative_error(actual[0], wanted[0]) < 1e-2
    assert relative_error(actual[1], wanted[1]) < 1e-6


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("gap", [0.0, 30.0])
def test_float16_errors_stay_in_range_for_flat_and_for_peaked_rows(path: str, gap: float) -> None:
    vocab_size = 200_000
    hidden = torch.full((2, 1), gap, device=DEVICE, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(vocab_size, 1, device=DEVICE, dtype=torch.float16)
    weight[5] = 1
    targets = torch.tensor([5, 9], device=DEVICE)
    loss = linear_gated_loss(hidden, weight.requires_grad_(), targets, "nll", path=path).loss
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    p = torch.softmax(gap * weight.detach().double().squeeze(1), 0)[5].item()
    # d nll / d hidden = sum_v p_v W_v - W_y, over a mean of two tokens.
    expected = torch.tensor([[p - 1], [p]], dtype=torch.float64, device=DEVICE) / 2
    assert torch.allclose(hidden.grad.double(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("softcap", [30.0, 1e3, 1e6])
def test_a_softcap_far_above_the_logits_costs_no_accuracy(path: str, softcap: float) -> None:
    case = random_case(24, 500, hidden_size=16, softcap=softcap).to(torch.float32)
    _assert_accurate(path, case, "deft", {}, 1.0, 1e-5)


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("softcap", [99.0, 101.0, 1e3])
def test_a_large_softcap_is_as_exact_in_float64(path: str, softcap: float) -> None:
    case = random_case(24, 50, softcap=softcap)
    result = gated(path, case)
    expected = formula(case, "deft", {})
    assert relative_error(result.token_loss, expected) < 1e-12
