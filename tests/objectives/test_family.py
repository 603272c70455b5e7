"""Every objective has the loss and the gate of the paper, at any probability, without an epsilon."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mpf

from deft_plugin import (
    Objective,
    TokenStatistics,
    build_objective,
    deformed_log_loss,
    objective_names,
)

from .tokens import token_statistics

VOCAB_SIZE = 262_144
LOG_P = (-0.0, -1e-30, -1e-12, -1e-5, -0.01, -0.7, -5.0, -60.0, -1e4)
COLLISION = (1 / VOCAB_SIZE, 1e-3, 0.4, 1.0)
ENTROPY = (0.0, 1e-8, 1.3, 2.9)


@dataclass(frozen=True)
class Token:
    """One token's statistics at fifty digits; `mean_p` is over all tokens of the batch."""

    log_p: mpf
    collision: mpf
    entropy: mpf
    mean_p: mpf

    @property
    def p(self) -> mpf:
        return mpmath.exp(self.log_p)


def _deformed(token: Token, focus: mpf) -> tuple[mpf, mpf]:
    if focus == 0:
        return -token.log_p, mpf(1)
    power = mpmath.exp(focus * token.log_p)
    return -mpmath.expm1(focus * token.log_p) / focus, power


def _weighted(token: Token, weight: mpf) -> tuple[mpf, mpf]:
    return -weight * token.log_p, weight


def _cayley(token: Token) -> mpf:
    uncertainty = 1 - token.p
    return (1 - uncertainty) / (1 + uncertainty)


def _cayley_trans(
    token: Token, mean: mpf, coefficient: float = 0.5, minimum: float = 0.001
) -> tuple[mpf, mpf]:
    floor = mpf(coefficient) * mean
    focus = floor + (1 - floor) * _cayley(token)
    return _deformed(token, min(max(focus, mpf(minimum)), mpf(1)))


Exact = Callable[[Token], tuple[mpf, mpf]]

# Name and parameters, and (loss, gate) as design and paper write them.
OBJECTIVES: list[tuple[str, dict[str, Any], Exact]] = [
    ("nll", {}, lambda t: (-t.log_p, mpf(1))),
    ("p", {}, lambda t: (1 - t.p, t.p)),
    ("alpha", {}, lambda t: _deformed(t, mpf(0.5))),
    ("alpha", {"a": 0}, lambda t: _deformed(t, mpf(0))),
    *[
        ("alpha", {"a": a}, lambda t, a=a: _deformed(t, mpf(a)))
        for a in (1e-30, 1e-12, 1e-8, 1e-4, 1.0, 2.5)
    ],
    ("dft", {}, lambda t: _weighted(t, t.p)),
    ("eaft", {}, lambda t: _weighted(t, t.entropy / 3)),
    (
        "eaft",
        {"k": 5, "normalizer": math.log(5), "exponent": 2},
        lambda t: _weighted(t, (t.entropy / mpf(math.log(5))) ** 2),
    ),
    (
        "eaft",
        {"entropy": "full", "exponent": 0.5},
        lambda t: _weighted(t, mpmath.sqrt(t.entropy / mpmath.log(VOCAB_SIZE))),
    ),
    ("eaft", {"exponent": 0}, lambda t: _weighted(t, mpf(1))),
    ("cayley", {}, lambda t: _deformed(t, _cayley(t))),
    ("cayley_trans", {}, lambda t: _cayley_trans(t, t.mean_p)),
    (
        "cayley_trans",
        {"scope": "fixed", "mean_probability": 0.6, "floor_coefficient": 0.2},
        lambda t: _cayley_trans(t, mpf(0.6), 0.2),
    ),
    (
        "cayley_trans",
        {"floor_coefficient": 0, "minimum": 0.3},
        lambda t: _cayley_trans(t, t.mean_p, 0, 0.3),
    ),
    ("deft", {}, lambda t: _deformed(t, t.collision)),
]
BY_NAME = [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in OBJECTIVES]


@pytest.fixture(autouse=True)
def _fifty_digits() -> Any:
    with mpmath.workdps(50):
        yield


def _grid(dtype: torch.dtype, vocab_size: int = VOCAB_SIZE) -> TokenStatistics:
    """All combinations of the numbers above."""
    log_p, collision, entropy = zip(*itertools.product(LOG_P, COLLISION, ENTROPY), strict=True)
    return token_statistics(
        log_p,
        collision=collision,
        entropy=entropy,
        top_k_entropy=entropy,
        vocab_size=vocab_size,
        dtype=dtype,
    )


def _tokens(statistics: TokenStatistics) -> list[Token]:
    rows = zip(
        statistics.log_p.tolist(),
        statistics.collision.tolist(),
        statistics.entropy.tolist(),
        strict=True,
    )
    log_ps = [mpf(value) for value in statistics.log_p.tolist()]
    mean_p = sum((mpmath.exp(value) for value in log_ps), mpf(0)) / len(log_ps)
    return [Token(mpf(a), mpf(b), mpf(c), mean_p) for a, b, c in rows]


def _worst_relative_error(actual: torch.Tensor, expected: list[mpf], smallest: float) -> float:
    return max(
        float(abs(mpf(value) - exact) / max(abs(exact), mpf(smallest)))
        for value, exact in zip(actual.tolist(), expected, strict=True)
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance", "smallest"),
    [(torch.float64, 1e-12, 1e-300), (torch.float32, 1e-5, 1e-36)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize(("name", "parameters", "exact"), BY_NAME)
def test_loss_and_gate_are_exact_at_any_probability(
    name: str,
    parameters: dict[str, Any],
    exact: Exact,
    dtype: torch.dtype,
    tolerance: float,
    smallest: float,
) -> None:
    objective = build_objective(name, parameters)
    statistics = _grid(dtype)
    expected = [exact(token) for token in _tokens(statistics)]

    loss = objective.loss(statistics.log_p, statistics)
    gate = objective.gate(statistics)

    assert loss.dtype == gate.dtype == dtype
    assert _worst_relative_error(loss, [loss for loss, _ in expected], smallest) < tolerance
    assert _worst_relative_error(gate, [gate for _, gate in expected], smallest) < tolerance


@pytest.mark.parametrize(("name", "parameters", "exact"), BY_NAME)
def test_gate_is_minus_the_derivative_of_the_loss_in_log_p(
    name: str, parameters: dict[str, Any], exact: Exact
) -> None:
    objective = build_objective(name, parameters)
    statistics = _grid(torch.float64)
    by_autograd = Objective.gate(objective, statistics)
    # PyTorch takes the derivative of expm1 from its value, as expm1(x) + 1.
    torch.testing.assert_close(objective.gate(statistics), by_autograd, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("name", "parameters", "exact"), BY_NAME)
def test_loss_depends_on_its_argument_log_p_alone(
    name: str, parameters: dict[str, Any], exact: Exact
) -> None:
    objective = build_objective(name, parameters)
    statistics = _grid(torch.float64)
    leaves = [statistics.log_p, statistics.collision, statistics.entropy, statistics.top_k_entropy]
    for leaf in leaves:
        leaf.requires_grad_()
    log_p = statistics.log_p.detach().clone().requires_grad_()

    loss = objective.loss(log_p, statistics)
    gradients = torch.autograd.grad(loss.sum(), [log_p, *leaves], allow_unused=True)

    assert gradients[0] is not None
    assert all(gradient is None for gradient in gradients[1:])


@pytest.mark.parametrize(
    ("name", "parameters", "loss", "gate"),
    [
        ("nll", {}, math.inf, 1.0),
        ("p", {}, 1.0, 0.0),
        ("alpha", {"a": 0}, math.inf, 1.0),
        ("alpha", {"a": 0.25}, 4.0, 0.0),
        ("dft", {}, 0.0, 0.0),
        ("eaft", {}, math.inf, 0.5),
        ("cayley", {}, math.inf, 1.0),
        ("cayley_trans", {}, 1000.0, 0.0),
        ("cayley_trans", {"scope": "fixed", "mean_probability": 0.5}, 4.0, 0.0),
        ("deft", {}, 8.0, 0.0),
    ],
)
def test_a_target_of_probability_zero_has_the_limits_of_loss_and_gate(
    name: str, parameters: dict[str, Any], loss: float, gate: float
) -> None:
    objective = build_objective(name, parameters)
    statistics = token_statistics(
        [-math.inf], collision=[0.125], entropy=[1.5], top_k_entropy=[1.5]
    )
    assert objective.loss(statistics.log_p, statistics).item() == pytest.approx(loss, rel=1e-15)
    assert objective.gate(statistics).item() == gate
    assert Objective.gate(objective, statistics).item() == gate


@pytest.mark.parametrize(("name", "parameters", "exact"), BY_NAME)
def test_nan_is_reported_and_not_hidden(
    name: str, parameters: dict[str, Any], exact: Exact
) -> None:
    objective = build_objective(name, parameters)
    nan = [math.nan]
    statistics = token_statistics(nan, collision=nan, entropy=nan, top_k_entropy=nan)
    assert objective.loss(statistics.log_p, statistics).isnan().all()


@pytest.mark.parametrize(("name", "parameters", "exact"), BY_NAME)
def test_no_tokens_give_no_losses(name: str, parameters: dict[str, Any], exact: Exact) -> None:
    objective = build_objective(name, parameters)
    statistics = token_statistics([], collision=[], entropy=[], top_k_entropy=[])
    assert objective.loss(statistics.log_p, statistics).shape == (0,)
    assert objective.gate(statistics).shape == (0,)
    assert Objective.gate(objective, statistics).shape == (0,)


def test_the_family_runs_from_nll_to_the_linear_probability() -> None:
    statistics = _grid(torch.float64)
    for a, name in [(0.0, "nll"), (1.0, "p")]:
        fixed, end = build_objective("alpha", {"a": a}), build_objective(name)
        loss = fixed.loss(statistics.log_p, statistics)
        assert torch.equal(loss, end.loss(statistics.log_p, statistics))
        assert torch.equal(fixed.gate(statistics), end.gate(statistics))


@pytest.mark.parametrize("focus", [0.0, 1e-12, 1e-7, 1e-5, 0.3, 1.0, 3.0])
def test_expected_loss_under_the_model_is_its_tsallis_entropy(focus: float) -> None:
    """Theorem 1: E_{y~p}[L_a(p_y)] = (1 - sum p^(1+a)) / a."""
    generator = torch.Generator().manual_seed(0)
    log_p = (3 * torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(0)
    losses = deformed_log_loss(log_p, torch.tensor(focus, dtype=torch.float64))
    exact = [mpmath.exp(mpf(value)) for value in log_p.tolist()]
    # The probabilities sum to 1 up to rounding, which 1/a would magnify: so not 1, but their sum.
    total = sum(exact)
    if focus == 0:
        expected = -sum(p * mpmath.log(p) for p in exact)
    else:
        expected = (total - sum(p ** (1 + mpf(focus)) for p in exact)) / mpf(focus)
    assert float((losses * log_p.exp()).sum()) == pytest.approx(float(expected), rel=1e-12)


def test_cayley_focus_is_the_cayley_transform_of_the_uncertainty() -> None:
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    focus = build_objective("cayley").focus(token_statistics(p.log().tolist()))
    assert focus is not None
    assert focus[0] == 0
    assert focus[-1] == 1
    assert (focus.diff() > 0).all()
    # The transform is its own inverse.
    torch.testing.assert_close((1 - focus) / (1 + focus), 1 - p, rtol=0, atol=1e-15)


@pytest.mark.parametrize("scope", ["micro_batch", "auto"])
def test_without_a_trainer_the_mean_is_that_of_the_call(scope: str) -> None:
    statistics = token_statistics([-0.1, -2.0, -7.0])
    mean = statistics.p.mean().item()
    coupled = build_objective("cayley_trans", {"scope": scope})
    fixed = build_objective("cayley_trans", {"scope": "fixed", "mean_probability": mean})
    torch.testing.assert_close(coupled.gate(statistics), fixed.gate(statistics), rtol=1e-15, atol=0)


def test_auto_is_the_default_and_a_running_mean_in_a_trainer() -> None:
    objective = build_objective("cayley_trans")
    assert objective == build_objective("cayley_trans", {"scope": "auto"})
    assert objective.step_scope == "ema"
    fixed = build_objective("cayley_trans", {"scope": "fixed", "mean_probability": 0.4})
    assert objective.at_mean(0.4) == fixed


@pytest.mark.parametrize("scope", ["global", "ema"])
def test_a_scope_of_the_whole_step_is_the_fixed_scope_at_its_mean(scope: str) -> None:
    statistics = token_statistics([-0.1, -2.0, -7.0])
    objective = build_objective("cayley_trans", {"scope": scope, "floor_coefficient": 0.7})
    fixed = {"scope": "fixed", "mean_probability": 0.4, "floor_coefficient": 0.7}
    assert objective.step_scope == scope
    assert objective.at_mean(0.4) == build_objective("cayley_trans", fixed)
    own = {"scope": "micro_batch", "floor_coefficient": 0.7}
    assert objective.at_mean(None) == build_objective("cayley_trans", own)
    with pytest.raises(ValueError, match=f"scope='{scope}' needs the mean.*at_mean"):
        objective.gate(statistics)


@pytest.mark.parametrize("name", sorted(set(objective_names()) - {"cayley_trans"}))
def test_no_other_objective_needs_a_mean(name: str) -> None:
    objective = build_objective(name)
    assert objective.step_scope is None
    assert objective.at_mean(0.4) is objective


@pytest.mark.parametrize(("name", "parameters", "exact"), BY_NAME)
def test_tokens_are_coupled_exactly_when_the_objective_says_so(
    name: str, parameters: dict[str, Any], exact: Exact
) -> None:
    objective = build_objective(name, parameters)
    both = token_statistics(
        [-0.5, -6.0], collision=[0.3, 0.1], entropy=[1.0, 2.0], top_k_entropy=[1.0, 2.0]
    )
    first = token_statistics([-0.5], collision=[0.3], entropy=[1.0], top_k_entropy=[1.0])
    floor_is_used = parameters.get("floor_coefficient") != 0
    independent = torch.equal(objective.gate(both)[:1], objective.gate(first))
    assert independent == (not objective.couples_tokens or not floor_is_used)


@pytest.mark.parametrize("name", ["nll", "p", "alpha", "cayley", "cayley_trans", "deft"])
@given(
    log_p=st.floats(-1e6, 0.0),
    collision=st.floats(1e-6, 1.0),
    other_log_p=st.floats(-1e6, 0.0),
)
def test_a_gate_of_the_deformed_log_family_lies_between_0_and_1(
    name: str, log_p: float, collision: float, other_log_p: float
) -> None:
    objective = build_objective(name)
    statistics = token_statistics([log_p, other_log_p], collision=[collision, 0.5])
    gate = objective.gate(statistics)
    assert ((gate >= 0) & (gate <= 1)).all()
    assert (objective.loss(statistics.log_p, statistics) >= 0).all()
