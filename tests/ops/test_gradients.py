"""Losses and gradients of every path are those of the formula on full logits, in float64 to 1e-10."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_plugin.ops import products, tiles

from .cases import (
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


@pytest.mark.parametrize("path", PATHS)
@with_objectives
def test_gradients_equal_autograd_of_the_formula(
    path: str, name: str, parameters: dict[str, Any]
) -> None:
    case = random_case(
        12, 40, bias=True, logit_scale=0.8, softcap=15.0, masked_share=0.25, logit_std=(0.1, 20)
    )
    expected = formula(case, name, parameters)
    result = gated(path, case, name, parameters=parameters, tile_rows=5)

    assert relative_error(result.token_loss, expected) < 1e-10
    mean = expected.sum() / result.mask.sum()
    assert relative_error(result.loss, mean) < 1e-10
    assert largest_error(gradients(result.loss, case), gradients(mean, case)) < 1e-10


@pytest.mark.parametrize("path", PATHS)
@with_objectives
def test_the_gradient_in_the_logits_is_gate_times_error(
    path: str, name: str, parameters: dict[str, Any]
) -> None:
    case = random_case(10, 16, identity=True, trainable=["hidden"])
    result = gated(path, case, name, parameters=parameters, reduction="sum")
    error = case.hidden.detach().softmax(1)
    error[torch.arange(10), case.targets] -= 1
    expected = result.gate.unsqueeze(1) * error
    assert relative_error(gradients(result.loss, case)[0], expected) < 1e-10


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a random call and of a random backward pass."""
    count = draw(st.integers(0, 9))
    bias, rank = draw(st.booleans()), draw(st.sampled_from([0, 3]))
    operands = ["hidden", "weight"]
    operands += ["bias"] if bias else []
    operands += ["low_rank_hidden", "low_rank_weight"] if rank else []
    trainable = draw(st.lists(st.sampled_from(operands), min_size=1, unique=True))
    return {
        "case": {
            "count": count,
            "vocab_size": draw(st.sampled_from([2, 3, 7, 64, 1025])),
            "hidden_size": draw(st.integers(1, 5)),
            "rank": rank,
            "bias": bias,
            "logit_scale": draw(st.sampled_from([1.0, 0.3, -1.5])),
            "softcap": draw(st.sampled_from([None, 4.0])),
            "masked_share": draw(st.sampled_from([0.0, 0.4, 1.0])),
            "trainable": trainable,
            "seed": draw(st.integers(0, 1000)),
        },
        "objective": draw(st.sampled_from(OBJECTIVES)),
        "dtype": draw(st.sampled_from([torch.float64, torch.float32])),
        "tile_rows": draw(st.one_of(st.none(), st.integers(1, count + 2))),
        "num_items_in_batch": draw(st.sampled_from([None, 1, 50])),
        # Upstream gradients of the loss and of the losses of single tokens.
        "loss_scale": draw(st.sampled_from([None, 1.0, -2.5])),
        "token_weights": draw(st.sampled_from([None, "equal", "positive", "signed"])),
    }


@pytest.mark.parametrize("path", [path for path in PATHS if path != "triton"])
@given(call=calls())
@settings(deadline=None, derandomize=True, max_examples=400)
def test_any_call_equals_the_formula(path: str, call: dict[str, Any]) -> None:
    _assert_call_equals_the_formula(path, call)


@pytest.mark.parametrize("path", [path for path in PATHS if path == "triton"])
@given(call=calls())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_any_call_equals_the_formula_in_an_interpreter(path: str, call: dict[str, Any]) -> None:
    """Fewer of them, each a hundred times slower."""
    _assert_call_equals_the_formula(path, call)


def _assert_call_equals_the_formula(path: str, call: dict[str, Any]) -> None:
    if call["loss_scale"] is None and call["token_weights"] is None:
        call["loss_scale"] = 1.0
    name, parameters = call["objective"]
    exact = random_case(**call["case"])
    case = exact.to(call["dtype"])
    exact = case.to(torch.float64)
    weights = torch.randn(case.targets.shape, generator=torch.Generator().manual_seed(1))
    weights = {
        None: torch.zeros_like(weights),
        "equal": torch.full_like(weights, 0.75),
        "positive": weights.abs(),
        "signed": weights,
    }[call["token_weights"]].to(case.targets.device, torch.float64)

    expected_tokens = formula(exact, name, parameters)
    divisor = call["num_items_in_batch"] or max(int((case.targets != -100).sum()), 1)
    expected_loss = expected_tokens.sum() / divisor
    result = gated(
        path,
        case,
        name,
        parameters=parameters,
        tile_rows=call["tile_rows"],
        num_items_in_batch=call["num_items_in_batch"],
    )

    def combined(loss: torch.Tensor, token_loss: torch.Tensor) -> torch.Tensor:
        total = 0 * loss
        if call["loss_scale"] is not None:
            total = total + call["loss_scale"] * loss
        if call["token_weights"] is not None:
            total = total + (weights * token_loss).sum()
        return total

    actual = gradients(combined(result.loss, result.token_loss), case)
    expected = gradients(combined(expected_loss, expected_tokens), exact)
    tolerance = 1e-10 if call["dtype"] == torch.float64 else 2e-4
    # Where all tokens are nearly certain, the formula itself has lost digits.
    smallest = 1e-3 if call["dtype"] == torch.float64 else 1e-2
    assert relative_error(result.token_loss, expected_tokens, smallest) < tolerance
    assert relative_error(result.loss, expected_loss, smallest) < tolerance
    assert [gradient.dtype for gradient in actual] == [leaf.dtype for leaf in case.leaves()]
    assert largest_error(actual, expected, smallest) < tolerance


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("tile_rows", [1, 4, 1000])
@with_objectives
def test_the_size_of_tiles_changes_nothing(
    path: str, tile_rows: int, name: str, parameters: dict[str, Any]
) -> None:
    case = random_case(9, 30, masked_share=0.2, softcap=9.0, bias=True)
    reference = gated("reference", case, name, parameters=parameters)
    result = gated(path, case, name, parameters=parameters, tile_rows=tile_rows)
    assert relative_error(result.loss, reference.loss) < 1e-10
    assert relative_error(result.gate, reference.gate) < 1e-10
    assert largest_error(gradients(result.loss, case), gradients(reference.loss, case)) < 1e-10


@pytest.mark.parametrize("tile_rows", [1, 4, 20])
@pytest.mark.parametrize("masked_share", [0.0, 0.3])
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
def test_the_size_of_tiles_of_given_logits_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tile_rows: int, masked_share: float, name: str
) -> None:
    for budget in ("CPU_TILE_BYTES", "GPU_TILE_BYTES"):
        monkeypatch.setattr(tiles, budget, 0)
    monkeypatch.setattr(tiles, "SMALLEST_TILE_ROWS", tile_rows)
    case = random_case(9, 30, masked_share=masked_share)
    expected = formula(case, name, {}).sum() / (case.targets != -100).sum()
    result = gated("logits", case, name)
    assert relative_error(result.loss, expected) < 1e-10
    assert largest_error(gradients(result.loss, case), gradients(expected, case)) < 1e-10


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
def test_statistics_in_the_result_are_those_of_the_softmax(path: str, name: str) -> None:
    case = random_case(13, 40, masked_share=0.3)
    result = gated(path, case, name, with_entropy=True)
    mask = case.targets != -100
    p_all = case.logits().detach().softmax(1)
    p = p_all.gather(1, case.targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    focus = (p_all**2).sum(1)
    if name == "cayley_trans":
        floor = 0.5 * p[mask].mean()
        focus = (floor + (1 - floor) * p / (2 - p)).clamp(0.001, 1)
    expected = {
        "log_p": p.log(),
        "focus": focus,
        "gate": p**focus,
        "entropy": torch.special.entr(p_all).sum(1),
        "is_top1": p_all.argmax(1) == case.targets,
    }
    assert torch.equal(result.mask, mask)
    for field, value in expected.items():
        actual = getattr(result, field)
        assert not actual.requires_grad
        assert relative_error(actual, torch.where(mask, value, 0)) < 1e-10, field
    assert result.is_top1.dtype == torch.bool


@pytest.mark.parametrize("path", PATHS)
def test_the_entropy_is_computed_on_request_only(path: str) -> None:
    assert gated(path, random_case(4, 5), "deft").entropy is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["dft", "eaft"])
def test_an_objective_outside_the_deformed_log_family_has_no_focus(path: str, name: str) -> None:
    assert gated(path, random_case(4, 5), name).focus is None


@pytest.mark.parametrize("path", PATHS)
def test_leading_dimensions_are_kept(path: str) -> None:
    flat = random_case(12, 20, masked_share=0.3)
    expected = gated(path, flat, with_entropy=True)
    expected_gradients = gradients(expected.loss, flat)
    shaped = flat.to(torch.float64)
    hidden = shaped.hidden.unflatten(0, (3, 4))
    result = gated(
        path,
        type(flat)(hidden=hidden, weight=shaped.weight, targets=flat.targets.unflatten(0, (3, 4))),
        with_entropy=True,
    )
    for field in ("token_loss", "mask", "log_p", "gate", "focus", "entropy", "is_top1"):
        assert torch.equal(getattr(result, field), getattr(expected, field).unflatten(0, (3, 4)))
    assert largest_error(gradients(result.loss, shaped), expected_gradients) < 1e-15


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
def test_a_retained_graph_gives_the_same_gradients_again(path: str, name: str) -> None:
    case = random_case(8, 20, masked_share=0.2)
    result = gated(path, case, name)
    first = gradients(result.loss, case, retain_graph=True)
    scaled = gradients(-3 * result.loss, case, retain_graph=True)
    tokens = gradients(result.token_loss[3:].sum(), case, retain_graph=True)
    again = gradients(result.loss, case)
    assert largest_error(again, first) == 0
    assert largest_error(scaled, [-3 * gradient for gradient in first]) < 1e-15
    assert largest_error(tokens, first) > 0.1


@pytest.mark.parametrize("path", FUSED_PATHS)
def test_a_second_derivative_is_refused(path: str) -> None:
    case = random_case(4, 5)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradients(gated(path, case).loss, case, create_graph=True)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
def test_gradients_of_a_tied_weight_add_up(path: str, name: str) -> None:
    case = random_case(12, 20, trainable=["weight"])
    inputs = torch.arange(12, device=case.weight.device)
    hidden = case.weight[inputs].tanh() * 4
    tied = type(case)(hidden=hidden, weight=case.weight, targets=case.targets)
    expected = formula(tied, name, {}).mean()
    (expected_gradient,) = torch.autograd.grad(expected, case.weight, retain_graph=True)
    (gradient,) = torch.autograd.grad(gated(path, tied, name).loss, case.weight)
    assert relative_error(gradient, expected_gradient) < 1e-10


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_fake_quantised_weight_passes_its_straight_through_gradient_on(
    path: str, name: str, rank: int
) -> None:
    """Quantisation-aware training: the rounded weight is no leaf, and clipped entries learn nothing."""
    case = random_case(12, 20, rank=rank, dtype=torch.float32, logit_std=(0.1, 3.0))
    scale = case.weight.detach().abs().amax(1) / 5
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    rounded = torch.fake_quantize_per_channel_affine(case.weight, scale, zero_point, 0, -4, 3)
    scored = dataclasses.replace(case, weight=rounded)
    leaves = case.leaves()
    result, expected = gated(path, scored, name), formula(scored, name, {})
    assert relative_error(result.token_loss, expected) < 1e-5
    for weights in (torch.ones(12), torch.linspace(-1, 2, 12)):
        losses = [(weights.to(loss) * loss).sum() for loss in (result.token_loss, expected)]
        actual, exact = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses)
        assert largest_error(actual, exact) < 1e-4
        clipped = (case.weight / scale.unsqueeze(1)).round().abs() > 4
        assert clipped.any()
        assert (actual[1][clipped] == 0).all()


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_weight_made_anew_in_each_call_may_be_frozen(path: str, name: str, rank: int) -> None:
    """A quantised lm_head is dequantised for the call; what is added to it learns."""
    case = random_case(12, 20, rank=rank, logit_std=(0.1, 3.0))
    scale = case.weight.detach().abs().amax() / 7
    stored = (case.weight.detach() / scale).round().to(torch.int8)
    steps = []
    for _ in range(2):
        scored = dataclasses.replace(case, weight=stored.to(torch.float64) * scale)
        result, expected = gated(path, scored, name), formula(scored, name, {})
        actual, exact = gradients(result.loss, scored), gradients(expected.mean(), scored)
        assert len(actual) == (3 if rank else 1)
        assert largest_error(actual, exact) < 1e-10
        steps.append(actual)
    assert largest_error(*steps) == 0


@pytest.mark.parametrize("path", PATHS)
def test_two_losses_through_one_weight_add_up(path: str) -> None:
    first, second = random_case(6, 20, seed=1), random_case(9, 20, seed=2)
    shared = type(first)(hidden=second.hidden, weight=first.weight, targets=second.targets)
    loss = gated(path, first).loss + 2 * gated(path, shared, "nll").loss
    expected = formula(first, "deft", {}).mean() + 2 * formula(shared, "nll", {}).mean()
    (gradient,) = torch.autograd.grad(loss, first.weight)
    (expected_gradient,) = torch.autograd.grad(expected, first.weight)
    assert relative_error(gradient, expected_gradient) < 1e-10


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("trainable", [["hidden"], ["weight"], ["bias"], ["hidden", "bias"], []])
def test_only_what_requires_a_gradient_gets_one(path: str, trainable: list[str]) -> None:
    case = random_case(7, 20, bias=True, trainable=trainable)
    result = gated(path, case, "cayley_trans")
    assert result.loss.requires_grad == bool(trainable)
    if trainable:
        result.loss.backward()
    for name in ("hidden", "weight", "bias"):
        assert (getattr(case, name).grad is not None) == (name in trainable)


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("trainable", [["hidden"], ["hidden", "weight", "bias"]])
def test_products_of_parts_of_the_vocabulary_change_nothing(
    monkeypatch: pytest.MonkeyPatch, path: str, trainable: list[str]
) -> None:
    """As on a GPU, where a vocabulary is no multiple of 8."""
    case = random_case(9, 131, masked_share=0.2, bias=True, trainable=trainable)
    whole = gated(path, case, "deft", tile_rows=4)
    expected = gradients(whole.loss, case)
    parts = [slice(0, 128), slice(128, 131)]
    monkeypatch.setattr(
        products, "vocabulary_parts", lambda weight: [part for part in parts if weight.size(0)]
    )
    result = gated(path, case, "deft", tile_rows=4)
    assert relative_error(result.token_loss, whole.token_loss) < 1e-12
    assert largest_error(gradients(result.loss, case), expected) < 1e-12


def test_the_vocabulary_is_split_on_an_accelerator_where_it_is_no_multiple_of_8() -> None:
    def parts(vocab_size: int, device: str) -> list[slice]:
        return products.vocabulary_parts(torch.empty(vocab_size, 4, device=device))

    assert parts(128_257, "meta") == [slice(0, 128_256), slice(128_256, 128_257)]
    assert parts(50_257, "meta") == [slice(0, 50_240), slice(50_240, 50_257)]
    assert parts(32_008, "meta") == [slice(0, 32_008)]
    assert parts(7, "meta") == [slice(0, 7)]
    assert parts(128_257, "cpu") == [slice(0, 128_257)]
