"""The formulas of the authors' public code, epsilons included, as an oracle of their own.

DEFT divides by a + 1e-6 where the paper divides by a. So their loss and gate are ours times a / (a + 1e-6): less by
at most V * 1e-6 of it, since a >= 1/V, and by 1e-6 / a wherever the model has an opinion. The other
formulas have no epsilon and agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .cases import DEVICE, PATHS, Case, gated, gradients, largest_error, random_case, relative_error

EPSILON = 1e-6
LogitsLoss = Callable[[Tensor, Tensor], Tensor]


def _target_log_p(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def authors_deft(logits: Tensor, targets: Tensor) -> Tensor:
    log_p = _target_log_p(logits, targets)
    focus = torch.softmax(logits, dim=-1).square().sum(-1).detach()
    return (1 - torch.exp(focus * log_p)) / (focus + EPSILON)


def authors_cayley_trans(logits: Tensor, targets: Tensor) -> Tensor:
    log_p = _target_log_p(logits, targets)
    p = log_p.exp().detach()
    floor = 0.5 * p.mean()
    uncertainty = 1 - p
    cayley = (1 - uncertainty) / (1 + uncertainty)
    focus = torch.clamp(floor + (1 - floor) * cayley, 0.001, 1.0)
    return -(torch.exp(focus * log_p) - 1) / focus


def authors_eaft(logits: Tensor, targets: Tensor, k1: float = 1.0) -> Tensor:
    top = torch.topk(logits.detach(), k=20, dim=-1).values
    log_q = top - top.logsumexp(-1, keepdim=True)
    entropy = -(log_q.exp() * log_q).sum(-1)
    return -((entropy / 3.0) ** k1) * _target_log_p(logits, targets)


def authors_dft(logits: Tensor, targets: Tensor) -> Tensor:
    log_p = _target_log_p(logits, targets)
    return -log_p.exp().detach() * log_p


def authors_losses(formula: LogitsLoss, case: Case) -> Tensor:
    """Of the valid tokens of one micro-batch, as their trainer selects them."""
    valid = case.targets != case.ignore_index
    return formula(case.logits()[valid], case.targets[valid])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "formula", "parameters"),
    [
        ("cayley_trans", authors_cayley_trans, {}),
        ("dft", authors_dft, {}),
        ("eaft", authors_eaft, {}),
        ("eaft", lambda z, y: authors_eaft(z, y, k1=0.5), {"exponent": 0.5}),
    ],
    ids=["cayley_trans", "dft", "eaft", "eaft_k1"],
)
def test_formulas_without_epsilon_agree_to_rounding(
    path: str, name: str, formula: LogitsLoss, parameters: dict[str, float]
) -> None:
    case = random_case(20, 60, masked_share=0.3)
    expected = authors_losses(formula, case)
    result = gated(path, case, name, parameters=parameters)
    assert relative_error(result.token_loss[result.mask], expected) < 1e-12
    assert largest_error(gradients(result.loss, case), gradients(expected.mean(), case)) < 1e-12


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("vocab_size", [2, 60, 5000])
def test_their_deft_is_ours_times_a_factor_within_v_epsilon_of_1(
    path: str, vocab_size: int
) -> None:
    case = random_case(20, vocab_size, masked_share=0.3)
    result = gated(path, case, "deft")
    assert result.focus is not None
    factor = result.focus / (result.focus + EPSILON)
    assert (1 - factor[result.mask] <= vocab_size * EPSILON).all()

    theirs = authors_losses(authors_deft, case)
    ours = result.token_loss[result.mask]
    # 1 - exp(x) of theirs loses the last digits of a confident token's loss.
    torch.testing.assert_close(
        theirs, (factor * result.token_loss)[result.mask], rtol=1e-9, atol=1e-15
    )
    assert relative_error(ours, theirs) <= vocab_size * EPSILON
    expected = gradients((factor.detach() * result.token_loss).sum(), case)
    assert largest_error(expected, gradients(theirs.sum(), case)) < 1e-12


@pytest.mark.parametrize("path", PATHS)
def test_their_deft_has_0_868_of_the_loss_and_gate_of_an_undecided_token(path: str) -> None:
    """a = 1/V, with V = 151,936, the vocabulary of Qwen 2.5."""
    vocab_size = 151_936
    targets = torch.tensor([7], device=DEVICE)
    hidden = torch.zeros(1, 1, dtype=torch.float64, device=DEVICE)
    weight = torch.ones(vocab_size, 1, dtype=torch.float64, device=DEVICE)
    bias = torch.zeros(vocab_size, dtype=torch.float64, device=DEVICE, requires_grad=True)
    case = Case(hidden, weight, targets, bias)

    ours = gated(path, case, "deft").loss
    theirs = authors_losses(authors_deft, case).sum()
    assert (theirs / ours).item() == pytest.approx(1 / (1 + vocab_size * EPSILON), rel=1e-9)
    assert (theirs / ours).item() == pytest.approx(0.868, abs=5e-4)
    (our_gradient,), (their_gradient,) = gradients(ours, case), gradients(theirs, case)
    assert relative_error(0.8681 * our_gradient, their_gradient) < 1e-4


@pytest.mark.parametrize("path", [path for path in PATHS if path != "reference"])
def test_their_float32_loss_of_a_confident_token_is_0_and_ours_is_not(path: str) -> None:
    """Theirs is 1 - exp(a * log p) with log p from a softmax that has rounded to 1."""
    case = random_case(1, 2, identity=True, dtype=torch.float32)
    with torch.no_grad():
        case.hidden.copy_(torch.tensor([[20.0, 0.0]]))
    case = Case(case.hidden, case.weight, torch.tensor([0], device=DEVICE))
    assert authors_losses(authors_deft, case).item() == 0
    # log p = -log1p(e^-20), and a = 1 to nine digits.
    assert gated(path, case, "deft").loss.item() == pytest.approx(2.0611536e-9, rel=1e-6)
