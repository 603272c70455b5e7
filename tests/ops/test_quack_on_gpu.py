"""Path "quack" on a Hopper or Blackwell GPU: its launches against their emulation, and losses against path "reference"."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from deft_plugin.ops import availability
from deft_plugin.ops.sums import StatisticsRequest

from . import quack_emulation
from .cases import Case, gated, gradients, largest_error, random_case, relative_error
from .test_quack import GRADIENT_ERROR, with_objectives

DEVICE = torch.device("cuda")
# Tensor cores add up in float32 without rounding to nearest: a few 1e-6 of logits that are up to 130.
STATISTICS_ERROR = 1e-3
SUM_ERROR = 1e-4


def obstacles() -> list[str]:
    """Why it does not run here."""
    if not torch.cuda.is_available():
        return ["needs a GPU."]
    return availability._quack_obstacles(DEVICE)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(obstacles()), reason=" ".join(obstacles())),
]


def launches() -> Any:
    return importlib.import_module("deft_plugin.ops.quack_kernels")


def random_operands(count: int, vocab_size: int, hidden_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets, some of them -1."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE).bfloat16()

    targets = torch.randint(vocab_size, (count,), generator=generator, device=DEVICE)
    targets[::5] = -1
    return normal(count, hidden_size), normal(vocab_size, hidden_size) / 4, targets


@pytest.mark.parametrize("request_", [{}, {"collision": True}, {"entropy": True}])
@pytest.mark.parametrize(
    ("vocab_size", "width"), [(768, 192), (768, 256), (640, 128), (32_000, 256), (1_536, 192)]
)
@pytest.mark.parametrize("stored", [True, False])
def test_the_product_leaves_what_its_emulation_does(
    request_: dict[str, bool], vocab_size: int, width: int, stored: bool
) -> None:
    hidden, weight, targets = random_operands(384, vocab_size, 128)
    request = StatisticsRequest(**request_)
    actual_powers = torch.full((384, vocab_size), torch.nan, device=DEVICE).bfloat16()
    expected_powers = actual_powers.clone()
    actual = launches().exponentials(
        actual_powers if stored else None, hidden, weight, targets, width, request
    )
    expected = quack_emulation.exponentials(
        expected_powers if stored else None, hidden, weight, targets, width, request
    )
    torch.testing.assert_close(actual.maxima, expected.maxima, rtol=1e-5, atol=1e-4)
    # Another integer only where log2(e) z is half-way between two.
    halfway = expected.maxima * quack_emulation.LOG2_E
    halfway = ((halfway - halfway.floor()) - 0.5).abs() < 1e-3
    same = actual.exponents == expected.exponents
    assert (same | halfway).all()
    inside = targets >= 0
    torch.testing.assert_close(
        actual.target_logit[inside], expected.target_logit[inside], rtol=1e-5, atol=1e-4
    )
    for name in ("powers", "squares", "weighted"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert relative_error(ours[same], theirs[same]) < SUM_ERROR, name
    if stored:
        difference = actual_powers.float() - expected_powers.float()
        difference = difference.unflatten(1, (-1, width))[same]
        assert (difference.abs() <= 2**-7 * 1.5).all()
        assert relative_error(difference + 1, torch.ones_like(difference)) < 2**-9


@pytest.mark.parametrize(
    ("count", "vocab_size", "hidden_size"), [(128, 384, 64), (384, 1_280, 200)]
)
def test_the_gradients_products_do_what_their_emulation_does(
    count: int, vocab_size: int, hidden_size: int
) -> None:
    kernels = launches()
    if not kernels.takes_strips(DEVICE):
        pytest.skip("QuACK's products with strips are for Hopper")
    hidden, weight, _ = random_operands(count, vocab_size, hidden_size)
    powers = torch.rand(count, vocab_size, device=DEVICE).bfloat16()
    strips = torch.randint(-12, 1, (vocab_size // 64, count), device=DEVICE).float().exp2()
    strips = strips.bfloat16()
    actual, expected = torch.empty_like(hidden), torch.empty_like(hidden)
    kernels.project_back_(actual, powers, strips, weight)
    quack_emulation.project_back_(expected, powers, strips, weight)
    assert relative_error(actual, expected) < 2**-8
    for dtype, keeps in ((torch.float32, (0, 1, 1)), (torch.bfloat16, (0,))):
        actual = torch.full((vocab_size, hidden_size), torch.nan, dtype=dtype, device=DEVICE)
        expected = actual.clone()
        for keep in keeps:
            kernels.add_outer_(actual, keep, powers, strips, hidden)
            quack_emulation.add_outer_(expected, keep, powers, strips, hidden)
        assert relative_error(actual, expected) < (2**-8 if dtype == torch.bfloat16 else SUM_ERROR)


def on_gpu(vocab_size: int, **options: Any) -> tuple[Case, Case]:
    """A case of 300 tokens, a fifth of them masked, and the same numbers in float64."""
    case = random_case(
        300,
        vocab_size,
        hidden_size=256,
        dtype=torch.bfloat16,
        masked_share=0.2,
        logit_std=(0.1, 30.0),
        **{"trainable": ("hidden", "weight"), **options},
    )
    return case, case.to(torch.float64)


@pytest.mark.parametrize("vocab_size", [384, 640, 32_000])
@pytest.mark.parametrize("tile_rows", [None, 128, 50])
@with_objectives
def test_losses_and_gradients_are_the_formulas(
    name: str, parameters: dict[str, Any], tile_rows: int | None, vocab_size: int
) -> None:
    case, exact = on_gpu(vocab_size)
    options = {"parameters": parameters, "with_entropy": True}
    actual = gated("quack", case, name, tile_rows=tile_rows, **options)
    expected = gated("reference", exact, name, **options)
    for statistic in ("log_p", "entropy"):
        error = (getattr(actual, statistic) - getattr(expected, statistic)).abs().max().item()
        assert error < STATISTICS_ERROR, statistic
    assert torch.equal(actual.is_top1, expected.is_top1)
    expected_gradients = gradients(expected.loss, exact)
    assert largest_error(gradients(actual.loss, case), expected_gradients) < GRADIENT_ERROR


def test_an_evaluation() -> None:
    case, exact = on_gpu(32_000)
    with torch.no_grad():
        actual = gated("quack", case, with_entropy=True)
    expected = gated("reference", exact, with_entropy=True)
    for statistic in ("log_p", "entropy", "focus"):
        error = (getattr(actual, statistic) - getattr(expected, statistic)).abs().max().item()
        assert error < STATISTICS_ERROR, statistic


def test_it_launches_on_the_tensors_device_and_stream() -> None:
    case, _ = on_gpu(640, trainable=("hidden",))
    expected = gradients(gated("quack", case).loss, case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = gradients(gated("quack", case).loss, case)
    stream.synchronize()
    assert torch.equal(actual[0], expected[0])
