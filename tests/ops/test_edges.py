"""Numbers and shapes at the edge: gaps of 1e-30 to 1e4, -inf, NaN, no tokens, two words, 262,144 words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mpf

from .cases import (
    DEVICE,
    FUSED_PATHS,
    LINEAR_PATHS,
    OBJECTIVES,
    PATHS,
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

GAPS = [gap * sign for gap in (1e-30, 1e-12, 1e-3, 1.0, 20.0, 80.0, 1e4) for sign in (1, -1)]


def two_words(gap: float, dtype: torch.dtype) -> Case:
    """One token whose target's logit is `gap` above the other one's."""
    return dataclasses.replace(
        random_case(1, 2, identity=True, dtype=dtype, trainable=["hidden", "weight"]),
        hidden=torch.tensor([[gap, 0.0]], dtype=dtype, device=DEVICE, requires_grad=True),
        targets=torch.tensor([0], device=DEVICE),
    )


@pytest.mark.parametrize("path", FUSED_PATHS)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"),
    [(torch.float64, 1e-12, 1e-300), (torch.float32, 1e-5, 1e-36)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("name", ["nll", "p", "dft", "cayley", "deft"])
def test_any_gap_between_two_logits_has_the_exact_loss_and_gradient(
    path: str, gap: float, dtype: torch.dtype, relative: float, absolute: float, name: str
) -> None:
    case = two_words(gap, dtype)
    with mpmath.workdps(60):
        z = mpf(case.hidden[0, 0].item())
        p, other = 1 / (1 + mpmath.exp(-z)), 1 / (1 + mpmath.exp(z))
        log_p = -mpmath.log1p(mpmath.exp(-z))
        focus = {
            "nll": mpf(0),
            "p": mpf(1),
            "dft": mpf(1),
            "cayley": p / (2 - p),
            "deft": p**2 + other**2,
        }[name]
        gate = mpmath.exp(focus * log_p)
        loss = -mpmath.expm1(focus * log_p) / focus if focus else -log_p
        if name == "dft":
            loss = -p * log_p
        expected_loss, expected_gradient = float(loss), float(-gate * other)

    result = gated(path, case, name)
    hidden_gradient, weight_gradient = gradients(result.loss, case)

    assert result.loss.item() == pytest.approx(expected_loss, rel=relative, abs=absolute)
    for gradient, sign in [(hidden_gradient[0, 0], 1), (hidden_gradient[0, 1], -1)]:
        assert gradient.item() == pytest.approx(
            sign * expected_gradient, rel=relative, abs=absolute
        )
    assert weight_gradient[0, 0].item() == pytest.approx(
        case.hidden.detach()[0, 0].item() * expected_gradient, rel=2 * relative, abs=absolute * 1e4
    )


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize("logit", [0.0, 3.0, -30.0, 60.0, -100.0, 1e4])
def test_a_softcap_that_saturates_keeps_its_small_derivative(
    path: str, dtype: torch.dtype, tolerance: float, logit: float
) -> None:
    """1 / cosh^2, where 1 - tanh^2 would have rounded to 0."""
    case = dataclasses.replace(two_words(logit, dtype), softcap=3.0)
    with mpmath.workdps(60):
        ratio = mpf(logit) / 3
        other = 1 / (1 + mpmath.exp(3 * mpmath.tanh(ratio)))
        expected = float(-other / mpmath.cosh(ratio) ** 2)
    hidden_gradient = gradients(gated(path, case, "nll").loss, case)[0]
    smallest = torch.finfo(dtype).tiny
    assert hidden_gradient[0, 0].item() == pytest.approx(expected, rel=tolerance, abs=smallest)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "parameters"), [(name, p) for name, p in OBJECTIVES if p.get("entropy") != "full"]
)
def test_padded_vocabulary_entries_do_not_exist(
    path: str, name: str, parameters: dict[str, Any]
) -> None:
    """But for log V, which the full entropy is divided by."""
    small = random_case(10, 20, bias=True, masked_share=0.2)
    assert small.bias is not None
    padded = dataclasses.replace(
        small,
        weight=torch.cat([small.weight.detach(), torch.randn_like(small.weight)]).requires_grad_(),
        bias=torch.cat(
            [small.bias.detach(), torch.full_like(small.bias, -math.inf)]
        ).requires_grad_(),
    )
    result = gated(path, padded, name, parameters=parameters, with_entropy=True)
    expected = gated(path, small, name, parameters=parameters, with_entropy=True)
    for field in ("token_loss", "log_p", "gate", "entropy"):
        assert relative_error(getattr(result, field), getattr(expected, field)) < 1e-12, field
    hidden, weight, bias = gradients(result.loss, padded)
    assert (weight[20:] == 0).all()
    assert (bias[20:] == 0).all()
    assert largest_error([hidden, weight[:20], bias[:20]], gradients(expected.loss, small)) < 1e-12


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "loss", "gate"),
    [
        ("nll", math.inf, 1),
        ("cayley", math.inf, 1),
        ("p", 1, 0),
        ("dft", 0, 0),
        ("deft", None, 0),
        ("cayley_trans", None, 0),
    ],
)
def test_a_target_of_probability_zero_has_the_limits_of_loss_and_gate(
    path: str, name: str, loss: float | None, gate: int
) -> None:
    """An infinite nll is reported as such; its gradient p - e_y is finite."""
    case = random_case(6, 5, bias=True)
    assert case.bias is not None
    with torch.no_grad():
        case.bias[case.targets[2]] = -math.inf
    result = gated(path, case, name)
    assert result.log_p[2] == -math.inf
    assert result.gate[2] == gate
    assert loss is None or result.token_loss[2] == loss
    assert result.loss.isinf() == (loss == math.inf)
    hidden, weight, bias = gradients(result.loss, case)
    assert (hidden[2] == 0).all() == (gate == 0)
    assert all(gradient.isfinite().all() for gradient in (hidden, weight, bias))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["nll", "deft", "eaft"])
def test_nan_is_reported_where_it_is_and_only_there(path: str, value: float, name: str) -> None:
    case = random_case(6, 12, bias=False)
    with torch.no_grad():
        case.hidden[2, 1] = value
    result = gated(path, case, name, with_entropy=True)
    nan = torch.arange(6, device=DEVICE) == 2
    for field in ("token_loss", "log_p", "entropy"):
        assert torch.equal(getattr(result, field).isnan(), nan), field
    assert result.loss.isnan()
    hidden, weight = gradients(result.loss, case)
    assert torch.equal(hidden.isnan().all(1), nan)
    assert torch.equal(hidden.isnan().any(1), nan)
    assert weight.isnan().any()


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("softcap", [30.0, 300.0])
@pytest.mark.parametrize("where", ["hidden", "bias"])
def test_nan_goes_through_a_softcap(path: str, softcap: float, where: str) -> None:
    case = random_case(6, 9, softcap=softcap, bias=True)
    assert case.bias is not None
    with torch.no_grad():
        (case.hidden[2] if where == "hidden" else case.bias)[3] = math.nan
    result = gated(path, case)
    nan = (
        torch.arange(6, device=DEVICE) == 2
        if where == "hidden"
        else torch.ones(6, dtype=torch.bool, device=DEVICE)
    )
    assert torch.equal(result.token_loss.isnan(), nan)
    assert torch.equal(gradients(result.loss, case)[0].isnan().any(1), nan)
    assert not result.is_top1[nan].any()


@pytest.mark.parametrize("path", PATHS)
def test_nan_at_an_ignored_position_is_not_touched(path: str) -> None:
    case = random_case(6, 12)
    case.targets[2] = -100
    expected = gated(path, case)
    expected_gradients = gradients(expected.loss, case)
    spoiled = case.to(torch.float64)
    with torch.no_grad():
        spoiled.hidden[2] = math.nan
    if path == "logits":
        (actual,) = torch.autograd.grad(gated(path, spoiled).loss, [spoiled.hidden])
        # NaN hidden states times a zero gradient are autograd's own, in the model's lm_head.
        assert torch.equal(actual, expected_gradients[0])
        return
    result = gated(path, spoiled)
    assert torch.equal(result.loss, expected.loss)
    assert largest_error(gradients(result.loss, spoiled), expected_gradients) == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("count", "masked_share"), [(0, 0.0), (5, 1.0)], ids=["none", "masked"])
@with_objectives
def test_without_a_valid_token_loss_and_gradients_are_zero(
    path: str, count: int, masked_share: float, name: str, parameters: dict[str, Any]
) -> None:
    case = random_case(count, 7, masked_share=masked_share, bias=True)
    result = gated(path, case, name, parameters=parameters, with_entropy=True)
    assert result.loss == 0
    assert torch.equal(result.token_loss, torch.zeros_like(result.token_loss))
    assert result.token_loss.shape == (count,)
    total = result.loss + result.token_loss.sum()
    for gradient, leaf in zip(gradients(total, case), case.leaves(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("vocab_size", [2, 1023, 1024, 1025, 4096])
@pytest.mark.parametrize(("name", "parameters"), [("deft", {}), ("eaft", {}), ("cayley_trans", {})])
def test_any_size_of_vocabulary(
    path: str, vocab_size: int, name: str, parameters: dict[str, Any]
) -> None:
    case = random_case(4, vocab_size)
    expected = formula(case, name, parameters)
    result = gated(path, case, name, parameters=parameters)
    assert relative_error(result.token_loss, expected) < 1e-10
    assert largest_error(gradients(result.loss, case), gradients(expected.mean(), case)) < 1e-10


@pytest.mark.parametrize("path", PATHS)
def test_equal_logits_have_a_focus_of_one_over_v_and_count_as_a_hit(path: str) -> None:
    case = random_case(3, 8)
    case.hidden.data.zero_()
    result = gated(path, case, "deft", with_entropy=True)
    assert result.focus.tolist() == pytest.approx([1 / 8] * 3, rel=1e-14)
    assert result.entropy.tolist() == pytest.approx([math.log(8)] * 3, rel=1e-14)
    assert result.is_top1.all()


@pytest.mark.parametrize("path", PATHS)
def test_ties_among_the_largest_logits_do_not_change_the_top_k_entropy(path: str) -> None:
    case = random_case(1, 6, identity=True, trainable=[])
    case.hidden.copy_(torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0, 3.0]]))
    gate = gated(path, case, "eaft", parameters={"k": 2, "normalizer": 1.0}).gate
    assert gate.item() == pytest.approx(math.log(2), rel=1e-14)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "target"),
    [(torch.int64, 12), (torch.int64, -1), (torch.int32, 2**30), (torch.uint8, 156)],
)
def test_a_target_out_of_range_is_refused(path: str, dtype: torch.dtype, target: int) -> None:
    case = random_case(4, 12)
    targets = case.targets.to(dtype)
    targets[1] = target
    with pytest.raises(
        ValueError, match=rf"1 of 4 targets are outside the vocabulary \[0, 12\).*being {target}\."
    ):
        gated(path, dataclasses.replace(case, targets=targets))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_targets_may_have_any_integer_type(path: str, dtype: torch.dtype) -> None:
    case = random_case(4, 12)
    narrow = dataclasses.replace(case, targets=case.targets.to(dtype))
    assert torch.equal(gated(path, narrow).loss, gated(path, case).loss)


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_tensors_need_not_be_contiguous(path: str, layout: str) -> None:
    case = random_case(6, 12)
    hidden, weight = case.hidden.detach(), case.weight.detach()
    if layout == "transposed":
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    elif layout == "sliced":
        hidden, weight = hidden.repeat(1, 2)[:, :8], weight.repeat_interleave(2, 0)[::2]
    else:
        hidden = hidden[:1].expand(6, -1)
    assert not hidden.is_contiguous()
    strided = dataclasses.replace(
        case, hidden=hidden.requires_grad_(), weight=weight.requires_grad_()
    )
    expected = formula(strided, "deft", {}).mean()
    result = gated(path, strided)
    actual = gradients(result.loss, strided)
    assert largest_error(actual, gradients(expected, strided)) < 1e-10


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["deft", "cayley_trans", "eaft"])
def test_an_evaluation_gives_the_same_figures_without_a_graph(
    path: str, mode: Any, name: str
) -> None:
    case = random_case(9, 12, masked_share=0.2)
    training = gated(path, case, name, with_entropy=True)
    with mode():
        evaluation = gated(path, case, name, with_entropy=True)
    assert not evaluation.loss.requires_grad
    for field in ("loss", "token_loss", "gate", "log_p", "entropy", "is_top1"):
        torch.testing.assert_close(
            getattr(evaluation, field), getattr(training, field).detach(), rtol=1e-14, atol=0
        )
