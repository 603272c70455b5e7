"""What is measured is what the tables say: masked labels, formulas, errors, products."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deft_plugin import linear_gated_loss
from deft_plugin.benchmark.contestant import Machine
from deft_plugin.benchmark.contestants import CONTESTANTS, FORMULA, OUR_NLL, OURS, PRODUCTS, formula
from deft_plugin.benchmark.job import IGNORED, Job, make_inputs
from deft_plugin.benchmark.measure import evaluate, gradient_error, gradients
from deft_plugin.benchmark.public_losses import PUBLIC_LOSSES

from .cases import job


def test_a_share_of_the_labels_is_masked_and_nothing_else_changes() -> None:
    whole, half = (make_inputs(job(masked=share), 96, 3) for share in (0.0, 0.5))
    masked = half[2] == IGNORED
    assert masked.sum() == 48 == job(masked=0.5).masked_tokens
    assert not (whole[2] == IGNORED).any()
    assert whole[0].equal(half[0])
    assert whole[1].equal(half[1])
    assert whole[2][~masked].equal(half[2][~masked])
    assert "50% of the labels masked" in job(masked=0.5).title
    assert "masked" not in job().title


@pytest.mark.parametrize("objective", ["nll", "deft", "dft", "cayley_trans"])
def test_masked_labels_leave_the_formulas_mean(objective: str) -> None:
    hidden, weight, targets = make_inputs(job(masked=0.5), 96, 3)
    kept = targets != IGNORED
    loss = formula(objective)
    whole = gradients(loss, hidden.double(), weight.double(), targets, False)
    alone = gradients(loss, hidden[kept].double(), weight.double(), targets[kept], False)
    torch.testing.assert_close(whole[0][kept], alone[0])
    torch.testing.assert_close(whole[1], alone[1])
    assert not whole[0][~kept].any()
    assert loss(hidden, weight, targets).item() == pytest.approx(
        linear_gated_loss(hidden, weight, targets, objective).loss.item(), rel=1e-5
    )


@pytest.mark.parametrize("masked", [0.0, 0.5])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name.startswith("deft_plugin")])
def test_our_error_is_small_and_a_wrong_gradient_is_not(
    name: str, frozen: bool, masked: float
) -> None:
    contestant = CONTESTANTS[name]
    loss = contestant.build()
    measured = job(frozen=frozen, masked=masked)
    if obstacle := contestant.needs.unmet(Machine.here("cpu"), measured):
        pytest.skip(obstacle)
    # What skipping loses is a choice, and is said.
    limit = 8e-3 if "skipping" in name else 1e-3
    assert gradient_error(loss, contestant.objective, measured) < limit
    other = "nll" if contestant.objective != "nll" else "dft"
    assert gradient_error(loss, other, measured) > 1e-2


def products(name: str, measured: Job, train: bool) -> float:
    """Of N by V by H, in one forward and backward or one evaluation."""
    loss = CONTESTANTS[name].build()
    inputs = make_inputs(measured, measured.tokens, 0)
    with FlopCounterMode(display=False) as counter:
        (gradients if train else evaluate)(loss, *inputs, measured.frozen)
    one = 2 * measured.tokens * measured.vocab * measured.hidden
    return counter.get_total_flops() / one


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "name", [FORMULA, OURS, OUR_NLL, PRODUCTS, "torch cross_entropy", "Liger FLCE, Triton"]
)
def test_evaluation_is_one_product(name: str, frozen: bool) -> None:
    if name in PUBLIC_LOSSES:
        for module in PUBLIC_LOSSES[name].needs.modules:
            pytest.importorskip(module)
    measured = job(vocab=192, frozen=frozen)
    assert products(name, measured, train=False) == 1
    if frozen or not name.startswith("deft_plugin"):  # The counter does not know addmm_.
        assert products(name, measured, train=True) == (2 if frozen else 3)


def test_the_products_alone_are_those_that_a_loss_cannot_avoid() -> None:
    # Of the labels that count, and of the largest vocabulary that is a multiple of 64.
    assert products(PRODUCTS, job(vocab=192, masked=0.5), train=True) == 1.5
    assert products(PRODUCTS, job(vocab=192 + 1), train=True) == pytest.approx(3 * 192 / 193)
    assert products(OURS, job(vocab=192, masked=0.5, frozen=True), train=True) == 1
    # Others compute every row.
    assert products("torch cross_entropy", job(vocab=192, masked=0.5), train=True) == 3
