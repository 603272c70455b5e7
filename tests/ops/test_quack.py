"""Path "quack" without a GPU: its arithmetic, with launches that are emulated as their contract says.

The emulation stands for the launches alone; sums, statistics, gates, the error, scales and the walk over tiles are the
code's. That the launches compile is tested in test_quack_ahead_of_time.py, and that they do what the emulation does, on a
GPU, in test_quack_on_gpu.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from deft_plugin.ops import quack_tiles
from deft_plugin.ops.quack_sums import block_scales, sums_and_error_
from deft_plugin.ops.sums import StatisticsRequest, Sums, empty_sums, statistics_of_sums

from . import quack_emulation
from .cases import (
    DEVICE,
    OBJECTIVES,
    Case,
    gated,
    gradients,
    largest_error,
    random_case,
    relative_error,
)

COUNT = 90
# Widths of a block: 192, 256 and 128.
VOCABULARIES = [384, 512, 640]
# Exponentials in bfloat16, 2^-9 each, and hidden states times gate in bfloat16.
GRADIENT_ERROR = 5e-3
# Logits of up to 130 in float32.
STATISTICS_ERROR = 2e-5

with_objectives = pytest.mark.parametrize(
    ("name", "parameters"),
    [
        pytest.param(name, parameters, id=f"{name}-{parameters}")
        for name, parameters in OBJECTIVES
        if name != "eaft" or parameters.get("entropy") == "full"
    ],
)


def bfloat16_case(count: int = COUNT, vocab_size: int = 384, **options: Any) -> tuple[Case, Case]:
    """A case, and the same numbers in float64."""
    options = {"trainable": ("hidden", "weight"), "logit_std": (0.1, 30.0)} | options
    case = random_case(
        count, vocab_size, hidden_size=64, dtype=torch.bfloat16, masked_share=0.2, **options
    )
    return case, case.to(torch.float64)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_statistics_are_those_of_float32_logits(emulated: Any, vocab_size: int) -> None:
    case, exact = bfloat16_case(vocab_size=vocab_size)
    actual = gated("quack", case, with_entropy=True)
    expected = gated("reference", exact, with_entropy=True)
    for name in ("log_p", "focus", "entropy", "gate", "token_loss"):
        error = (getattr(actual, name) - getattr(expected, name)).abs().max().item()
        assert error < STATISTICS_ERROR, name
    assert torch.equal(actual.is_top1, expected.is_top1)


@with_objectives
def test_every_objective_has_the_formulas_gradients(
    emulated: Any, name: str, parameters: dict[str, Any]
) -> None:
    case, exact = bfloat16_case(60)
    actual = gated("quack", case, name, parameters=parameters, tile_rows=25)
    expected = gated("reference", exact, name, parameters=parameters)
    assert abs(actual.loss.item() / expected.loss.item() - 1) < 1e-5
    expected_gradients = gradients(expected.loss, exact)
    assert largest_error(gradients(actual.loss, case), expected_gradients) < GRADIENT_ERROR


# 128 and 256 are one block a row.
@pytest.mark.parametrize("vocab_size", [128, 256, *VOCABULARIES])
@pytest.mark.parametrize(("count", "tile_rows"), [(COUNT, None), (COUNT, 50), (180, 128)])
def test_tiles_of_any_size_have_the_formulas_gradients(
    emulated: Any, count: int, tile_rows: int | None, vocab_size: int
) -> None:
    case, exact = bfloat16_case(count, vocab_size)
    actual = gradients(gated("quack", case, tile_rows=tile_rows).loss, case)
    expected = gradients(gated("reference", exact).loss, exact)
    assert largest_error(actual, expected) < GRADIENT_ERROR


def test_gradients_are_nearer_than_those_of_bfloat16_logits(emulated: Any) -> None:
    case, exact = bfloat16_case()
    expected = gradients(gated("reference", exact).loss, exact)
    actual = gradients(gated("quack", case).loss, case)
    chunked = gradients(gated("chunked", case).loss, case)
    for ours, theirs, truth in zip(actual, chunked, expected, strict=True):
        assert relative_error(ours, truth) < relative_error(theirs, truth)


@pytest.mark.parametrize("trainable", [("hidden",), ("weight",)])
def test_either_operand_may_be_frozen(emulated: Any, trainable: tuple[str, ...]) -> None:
    case, exact = bfloat16_case(trainable=trainable)
    actual = gradients(gated("quack", case, tile_rows=40).loss, case)
    expected = gradients(gated("reference", exact).loss, exact)
    assert largest_error(actual, expected) < GRADIENT_ERROR


def test_upstream_gradients_may_differ_between_tokens(emulated: Any) -> None:
    case, exact = bfloat16_case()
    weights = torch.rand(COUNT, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual = gated("quack", case, tile_rows=40).token_loss
    expected = gated("reference", exact).token_loss
    actual_gradients = gradients((actual * weights.float()).sum(), case)
    expected_gradients = gradients((expected * weights).sum(), exact)
    assert largest_error(actual_gradients, expected_gradients) < GRADIENT_ERROR


def test_float32_operands_under_autocast(emulated: Any) -> None:
    case, exact = bfloat16_case()
    with torch.autocast("cpu", torch.bfloat16):
        single = case.to(torch.float32)
        loss = gated("quack", single, tile_rows=128).loss
    expected = gradients(gated("reference", exact).loss, exact)
    actual = gradients(loss, single)
    assert all(gradient.dtype == torch.float32 for gradient in actual)
    assert largest_error(actual, expected) < GRADIENT_ERROR


def test_an_evaluation_stores_no_exponentials(
    emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = []
    exponentials = quack_emulation.exponentials

    def recorded(powers: Tensor | None, *args: Any) -> Any:
        stored.append(powers)
        return exponentials(powers, *args)

    monkeypatch.setattr(quack_emulation, "exponentials", recorded)
    case, exact = bfloat16_case()
    with torch.no_grad():
        actual = gated("quack", case, with_entropy=True, tile_rows=40)
    assert stored
    assert all(powers is None for powers in stored)
    expected = gated("reference", exact, with_entropy=True)
    for name in ("log_p", "entropy", "token_loss"):
        error = (getattr(actual, name) - getattr(expected, name)).abs().max().item()
        assert error < STATISTICS_ERROR, name
    assert (actual.log_p <= 0).all()


def test_no_valid_token(emulated: Any) -> None:
    case, _ = bfloat16_case(count=5)
    masked = dataclasses.replace(case, targets=torch.full((5,), -100))
    loss = gated("quack", masked).loss
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(loss, masked))


def one_hot_case(margins: list[float], other: int, vocab_size: int = 384) -> tuple[Case, Case]:
    """Each row's logits are 0 but for its target's, the margin, and the entry `other`, 1; exactly in bfloat16.

    Token i has its target at column i.
    """
    logits = torch.zeros(len(margins), vocab_size, dtype=torch.float64)
    logits[:, other] = 1
    logits[range(len(margins)), range(len(margins))] = torch.tensor(margins, dtype=torch.float64)
    case = Case(
        hidden=logits.bfloat16().requires_grad_(),
        weight=torch.eye(vocab_size, dtype=torch.bfloat16).requires_grad_(),
        targets=torch.arange(len(margins)),
    )
    return case, case.to(torch.float64)


@pytest.mark.parametrize("other", [100, 300])
def test_what_is_left_of_a_certain_token_does_not_cancel(emulated: Any, other: int) -> None:
    """With the rest of the probability in the target's own block and in another; 1 - p from 1 to 1e-26."""
    margins = [float(margin) for margin in range(0, 65, 2)]
    case, exact = one_hot_case(margins, other)
    actual, expected = gated("quack", case, "nll"), gated("reference", exact, "nll")
    # The reference's log p has lost it in float64 from 1e-16 on; the logits have not.
    exact_missed = torch.tensor(
        [(382 + torch.e) / (382 + torch.e + torch.tensor(m).double().exp()) for m in margins]
    )
    missed = -torch.expm1(actual.log_p.double())
    assert ((missed / exact_missed - 1).abs() < 2**-9).all()
    assert (actual.log_p - expected.log_p).abs().max() < 1e-6
    (gradient, _) = gradients(actual.loss, case)
    # In the target's column the gradient is 1 - p, and the same in all others together.
    error = gradient.double() * len(margins)
    rows = torch.arange(len(margins))
    assert ((-error[rows, rows] / exact_missed - 1).abs() < 2**-7).all()
    error[rows, rows] = 0
    assert ((error.sum(1) / exact_missed - 1).abs() < 2**-6).all()


def test_a_sum_that_was_rounded_down_leaves_nothing_negative(emulated: Any) -> None:
    """As a GPU's sums and powers may differ in their last bit, in an evaluation of a certain token."""
    case, _ = one_hot_case([60.0], other=100)
    request = StatisticsRequest()
    partials = quack_emulation.exponentials(
        None, case.hidden.detach(), case.weight.detach(), case.targets, 192, request
    )
    partials.powers[:, 0] *= 1 - 2**-22
    sums = empty_sums(1, torch.bfloat16, DEVICE)
    sums_and_error_(sums, partials, case.targets, 192, request, None)
    log_p = statistics_of_sums(sums, 384, request).log_p
    assert -1e-6 < log_p.item() <= 0


@pytest.mark.parametrize("margin", [-50.0, -90.0, -200.0, -1000.0])
def test_a_target_far_below_the_largest_logit(emulated: Any, margin: float) -> None:
    """Its block is so far below that neither it nor its entry has room in bfloat16 at one scale."""
    case, exact = one_hot_case([0.0, 0.0], other=300)
    hidden = case.hidden.detach().clone()
    hidden[:, :192] += margin
    case = dataclasses.replace(case, hidden=hidden.requires_grad_())
    exact = case.to(torch.float64)
    actual, expected = gated("quack", case, "nll"), gated("reference", exact, "nll")
    assert (actual.log_p / expected.log_p - 1).abs().max() < 1e-5
    for ours, truth in zip(
        gradients(actual.loss, case), gradients(expected.loss, exact), strict=True
    ):
        assert ours.isfinite().all()
        # Triton's interpreter cuts bfloat16 off where a GPU rounds.
        assert relative_error(ours, truth) < 2**-7


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_loud_and_alone(emulated: Any, value: float) -> None:
    case, _ = bfloat16_case(trainable=("hidden",))
    row = int((case.targets != -100).nonzero()[3])
    hidden = case.hidden.detach().clone()
    hidden[row, 0] = value
    case = dataclasses.replace(case, hidden=hidden.requires_grad_())
    result = gated("quack", case, with_entropy=True)
    (gradient,) = gradients(result.loss, case)
    assert result.log_p[row].isnan()
    assert result.entropy is not None
    assert result.entropy[row].isnan()
    assert not result.is_top1[row]
    others = torch.arange(COUNT) != row
    assert result.log_p[others].isfinite().all()
    assert gradient[row].isnan().all()
    assert gradient[others].isfinite().all()


def test_only_what_is_requested_is_summed(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []
    exponentials = quack_emulation.exponentials

    def recorded(*args: Any) -> Any:
        requests.append(args[-1])
        return exponentials(*args)

    monkeypatch.setattr(quack_emulation, "exponentials", recorded)
    case, _ = bfloat16_case()
    gated("quack", case, "nll")
    gated("quack", case, "deft", with_entropy=True)
    assert requests == [StatisticsRequest(), StatisticsRequest(collision=True, entropy=True)]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_the_error_is_what_quacks_own_glue_makes_of_it(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, vocab_size: int
) -> None:
    """Its Triton kernels between the products, in Triton's interpreter, on the same exponentials."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    theirs = pytest.importorskip("quack.linear_cross_entropy")
    if not hasattr(theirs._lce_glue_row, "fn") or torch.cuda.is_available():
        pytest.skip("Triton's kernels have been compiled for the GPU")
    case, _ = bfloat16_case(128, vocab_size, logit_std=(0.1, 8.0))
    hidden, weight = case.hidden.detach(), case.weight.detach()
    targets = case.targets.clamp(min=0)
    width = quack_tiles.block_width(vocab_size, quack_tiles.HOPPER_WIDTHS)
    powers = torch.empty(128, vocab_size, dtype=torch.bfloat16)
    partials = quack_emulation.exponentials(
        powers, hidden, weight, targets, width, StatisticsRequest()
    )
    sums = empty_sums(128, torch.bfloat16, hidden.device)
    their_powers, loss, scale = powers.clone(), torch.empty(128), torch.empty(128)
    their_strips = torch.empty(vocab_size // 64, 128, dtype=torch.bfloat16)
    theirs.lce_glue(
        partials.exponents.clone(),
        partials.powers,
        hidden,
        targets,
        partials.target_logit,
        their_powers,
        loss,
        their_strips,
        scale,
        None,
        width,
    )
    sums_and_error_(sums, partials, targets, width, StatisticsRequest(), powers)
    strips = quack_tiles._strips(block_scales(partials.exponents, torch.bfloat16), width)
    statistics = statistics_of_sums(sums, vocab_size, StatisticsRequest())
    assert torch.equal(strips, their_strips)
    torch.testing.assert_close(-statistics.log_p, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Sums(*sums).row_factor, scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(powers, their_powers, rtol=2**-7, atol=1e-4)
    changed = powers != their_powers
    changed[torch.arange(128), targets] = False
    assert not changed.any()


@pytest.mark.parametrize("name", ["takes_strips", "exponentials", "project_back_", "add_outer_"])
def test_the_emulation_is_called_as_the_launches_are(name: str) -> None:
    pytest.importorskip("quack", reason="needs the extra `quack`")
    launches = importlib.import_module("deft_plugin.ops.quack_kernels")
    emulated = inspect.signature(getattr(quack_emulation, name))
    assert emulated == inspect.signature(getattr(launches, name))
