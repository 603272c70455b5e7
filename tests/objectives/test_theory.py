"""The mathematics of docs/theory.md: a test for each numbered statement, with its number in the name.

Gates come from the library's objectives and gradients from its loss. `printed` also checks that the page
prints the figure that was computed.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

import mpmath
import pytest
import torch
from torch import Tensor

from deft_plugin import Objective, TokenStatistics, build_objective, deformed_log_loss, gated_loss

PAGE = Path(__file__).parents[2] / "docs" / "theory.md"
STATEMENTS = dict(
    re.findall(
        r"^\*\*\((\d+)\)(.*?)(?=^\*\*\(|^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
)
DTYPE = torch.float64
OBJECTIVES = {
    "nll": build_objective("nll"),
    "p": build_objective("p"),
    "dft": build_objective("dft"),
    "alpha": build_objective("alpha"),
    "cayley": build_objective("cayley"),
    "cayley_trans": build_objective("cayley_trans", {"scope": "fixed", "mean_probability": 0.5}),
    "deft": build_objective("deft"),
    "eaft": build_objective("eaft", {"k": 3}),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def printed(number: int, value: float, digits: int) -> None:
    """The page's statement prints `value`, rounded to so many significant digits."""
    text = f"{value:#.{digits}g}".rstrip(".")
    assert re.search(rf"(?<![\d.]){re.escape(text)}(?!\d)", STATEMENTS[str(number)]), (
        f"statement ({number}) does not print {text}"
    )


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DTYPE)


def random_logits(rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Logits from nearly uniform to nearly one-hot, shape (rows, V)."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 6, rows, dtype=DTYPE)[:, None]
    return scale * torch.randn(rows, vocab_size, generator=generator, dtype=DTYPE)


def statistics_of(logits: Tensor, log_p: Tensor) -> TokenStatistics:
    """Statistics of targets with these log-probabilities, one for each row of logits (N, V)."""
    p = logits.softmax(-1)
    largest = p.topk(min(3, p.shape[-1])).values
    largest = largest / largest.sum(-1, keepdim=True)
    return TokenStatistics(
        log_p=log_p,
        vocab_size=logits.shape[-1],
        collision=(p * p).sum(-1),
        entropy=torch.special.entr(p).sum(-1),
        top_k_entropy=torch.special.entr(largest).sum(-1),
    )


def gates(objective: Objective, logits: Tensor) -> Tensor:
    """The gate of each token of the vocabulary if it were the target, shape (B, V) as the logits."""
    rows = logits.repeat_interleave(logits.shape[-1], 0)
    log_p = logits.log_softmax(-1).flatten()
    return objective.gate(statistics_of(rows, log_p)).reshape(logits.shape)


def field(objective: Objective, logits: Tensor, r: Tensor) -> Tensor:
    """Minus the gradient that labels of distribution r give on average, E[g (e_y - p)]; (B, V)."""
    weighted = r * gates(objective, logits)
    return weighted - logits.softmax(-1) * weighted.sum(-1, keepdim=True)


def flow(
    objective: Objective, logits: Tensor, r: Tensor, steps: int = 4000, step: float = 0.5
) -> Tensor:
    """Where the field leads from these logits (B, V): probabilities."""
    for _ in range(steps):
        logits = logits + step * field(objective, logits, r)
    return logits.softmax(-1)


def gate_of(objective: Objective, p: Tensor, collision: Tensor | None = None) -> Tensor:
    """The gate at these probabilities of the target."""
    return objective.gate(TokenStatistics(p.log(), 150_000, collision=collision))


def settled(p: Tensor) -> Tensor:
    """C2 when all the rest is on one other token."""
    return p * p + (1 - p) ** 2


def undecided(p: Tensor, vocab_size: int = 150_000) -> Tensor:
    """C2 when the rest is flat."""
    return p * p + (1 - p) ** 2 / (vocab_size - 1)


def escort(r: Tensor, order: float) -> Tensor:
    return r**order / (r**order).sum()


def cayley_stationary(r: Tensor) -> Tensor:
    """The solution of (1 - c(p_v)) log p_v = log r_v - mu with the sum 1, by bisection."""

    def inverse(value: Tensor) -> Tensor:
        low, high = torch.full_like(value, -700), torch.zeros_like(value)
        for _ in range(200):
            middle = (low + high) / 2
            p = middle.exp()
            above = 2 * (1 - p) / (2 - p) * middle > value
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return middle.exp()

    low, high = r.log().max(), r.log().max() + 50
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if inverse(r.log() - mu).sum() > 1 else (low, mu)
    return inverse(r.log() - mu)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@every_objective
def test_01_gradient_is_gate_times_error(name: str) -> None:
    logits = random_logits(40, 9).requires_grad_()
    targets = torch.arange(40) % 9
    result = gated_loss(logits, targets, OBJECTIVES[name])
    (gradient,) = torch.autograd.grad(result.token_loss.sum(), logits)
    p = logits.detach().softmax(-1)
    error = p - torch.eye(9, dtype=DTYPE)[targets]
    log_p = p.log()[torch.arange(40), targets]
    gate = OBJECTIVES[name].gate(statistics_of(logits.detach(), log_p))
    assert_close(gradient, gate[:, None] * error)
    assert_close(gate, Objective.gate(OBJECTIVES[name], statistics_of(logits.detach(), log_p)))


@every_objective
def test_02_invariant_to_a_shift_and_to_names_and_not_to_temperature(name: str) -> None:
    objective = OBJECTIVES[name]
    logits, targets = random_logits(40, 9), torch.arange(40) % 9
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))

    def of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.clone().requires_grad_()
        loss = gated_loss(logits, targets, objective).token_loss
        return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]

    loss, gradient = of(logits, targets)
    shifted_loss, shifted_gradient = of(logits + 30, targets)
    assert_close(shifted_loss, loss)
    assert_close(shifted_gradient, gradient)
    assert_close(gradient.sum(-1), torch.zeros(40, dtype=DTYPE))
    renamed_loss, renamed_gradient = of(logits[:, order], order.argsort()[targets])
    assert_close(renamed_loss, loss)
    assert_close(renamed_gradient, gradient[:, order])
    assert (of(2 * logits, targets)[0] - loss).abs().median() > 1e-3


@every_objective
def test_03_norms_of_the_gradient(name: str) -> None:
    logits, targets = random_logits(40, 9).requires_grad_(), torch.arange(40) % 9
    result = gated_loss(logits, targets, OBJECTIVES[name])
    (gradient,) = torch.autograd.grad(result.token_loss.sum(), logits)
    p_y = result.log_p.exp()
    collision = logits.detach().softmax(-1).square().sum(-1)
    norm = gradient.norm(dim=-1)
    assert_close(norm, result.gate * (collision - 2 * p_y + 1).sqrt())
    assert_close(gradient.abs().sum(-1), 2 * result.gate * (1 - p_y))
    error = result.gate * (1 - p_y)
    assert (norm <= math.sqrt(2) * error * (1 + 1e-12)).all()
    assert (norm >= math.sqrt(9 / 8) * error * (1 - 1e-12)).all()


def test_04_the_deformed_logarithm() -> None:
    p = torch.linspace(0.001, 1, 200, dtype=DTYPE)
    focus = (1e-7, 0.1, 0.5, 1.0, 2.0, 5.0)
    losses = torch.stack([deformed_log_loss(p.log(), tensor(a)) for a in focus])
    for a, loss in zip(focus, losses, strict=True):
        q = 1 - a
        if q != 1:
            assert_close(loss, -(p ** (1 - q) - 1) / (1 - q), 1e-8)
        by_quadrature = [
            float(mpmath.quad(lambda t, a=a: t ** (a - 1), [float(x), 1])) for x in p[::40]
        ]
        assert_close(loss[::40], tensor(*by_quadrature), 1e-6)
        assert ((loss >= 0) & (loss <= 1 / a)).all()
        curvature = loss.diff().diff()
        assert {
            -1: (curvature > 0).all(),
            0: curvature.abs().max() < 1e-12,
            1: (curvature < 0).all(),
        }[(a > 1) - (a < 1)]
    assert (losses.diff(dim=0)[:, :-1] < 0).all()
    assert_close(losses[0], -p.log(), 1e-5)
    assert_close(losses[3], 1 - p)
    assert deformed_log_loss(p.log(), tensor(1e6))[:-1].max() < 1e-5
    # Slope at an unknown token, for a = 2.
    assert deformed_log_loss(tensor(1e-9, 1e-12).log(), tensor(2.0)).diff().abs() < 1e-17


@pytest.mark.parametrize("a", [0.1, 0.5, 1.0, 2.0])
def test_05_a_fixed_focus_pulls_hardest_at_a_over_1_plus_a(a: float) -> None:
    p = torch.linspace(1e-6, 1, 1_000_001, dtype=DTYPE)
    pull = gate_of(build_objective("alpha", {"a": a}), p) * (1 - p)
    assert p[pull.argmax()].item() == pytest.approx(a / (1 + a), abs=2e-6)
    assert pull.max().item() == pytest.approx(a**a / (1 + a) ** (1 + a), rel=1e-9)
    assert pull[0] < 0.3
    for name in ("p", "dft"):
        assert (gate_of(OBJECTIVES[name], p) * (1 - p)).max().item() == pytest.approx(1 / 4)
    assert (gate_of(OBJECTIVES["nll"], p) * (1 - p)).argmax() == 0


@pytest.mark.parametrize("a", [1e-9, 0.3, 1.0, 2.5])
def test_06_the_self_score_is_the_tsallis_entropy(a: float) -> None:
    logits = random_logits(20, 50)
    p = logits.softmax(-1)
    self_score = (p * deformed_log_loss(logits.log_softmax(-1), tensor(a))).sum(-1)
    entropy_index, loss_index = 1 + a, 1 - a
    assert entropy_index + loss_index == 2
    if a < 1e-6:
        assert_close(self_score, torch.special.entr(p).sum(-1), 1e-7)
    else:
        assert_close(self_score, (1 - p.pow(entropy_index).sum(-1)) / (entropy_index - 1))
    if a == 1:
        focus = OBJECTIVES["deft"].focus(statistics_of(logits, p[:, 0].log()))
        assert focus is not None
        assert_close(self_score, 1 - focus)


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Probabilities at the minimum of a loss of log-probabilities, by LBFGS on logits."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-13,
        tolerance_change=1e-16,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits.log_softmax(-1))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("a", [0.2, 0.5, 0.8])
def test_07_minimiser_is_the_escort_distribution(a: float) -> None:
    r = tensor(0.4, 0.3, 0.2, 0.1)
    found = minimise(lambda log_p: (r * deformed_log_loss(log_p, tensor(a))).sum(), r.log())
    assert_close(found, escort(r, 1 / (1 - a)), 1e-5)
    assert (found - r).abs().max() > 0.02
    # Strictly convex on the simplex: below the chord between any two distributions.
    first, second = random_logits(20, 4).softmax(-1), random_logits(20, 4, seed=1).softmax(-1)

    def risk(p: Tensor) -> Tensor:
        return (r * deformed_log_loss(p.log(), tensor(a))).sum(-1)

    assert (risk((first + second) / 2) < (risk(first) + risk(second)) / 2).all()
    example = escort(tensor(0.7, 0.3), 2.0)
    printed(7, example[0].item(), 3)
    printed(7, example[1].item(), 3)
    hot = ((1 - a) * found.log()).softmax(-1)
    assert_close(hot, r, 1e-5)


@pytest.mark.parametrize("a", [1.0, 2.0])
def test_07_from_a_focus_of_1_on_the_most_frequent_label_takes_all(a: float) -> None:
    r = tensor(0.4, 0.3, 0.2, 0.1)
    found = minimise(
        lambda log_p: (r * deformed_log_loss(log_p, tensor(a))).sum(), tensor(0, 0.1, 0, 0)
    )
    assert found[0] > 0.999


def test_08_from_p_equal_to_r_the_loss_falls_and_nll_rises() -> None:
    r = tensor(0.7, 0.3)
    a = tensor(0.5)
    logits = r.log().requires_grad_()
    loss = (r * deformed_log_loss(logits.log_softmax(-1), a)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_close(gradient, r * (r ** (1 + a)).sum() - r ** (1 + a))
    # Along the whole descent.
    z, losses, nlls = r.log(), [], []
    for _ in range(400):
        log_p = z.log_softmax(-1)
        losses.append((r * deformed_log_loss(log_p, a)).sum().item())
        nlls.append(-(r * log_p).sum().item())
        z = z + field(OBJECTIVES["alpha"], z[None], r)[0]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses[:50]))
    assert all(later > earlier for earlier, later in itertools.pairwise(nlls[:50]))
    end = escort(r, 2.0)
    divergence = (r * (r / end).log()).sum().item()
    assert nlls[-1] - nlls[0] == pytest.approx(divergence, rel=1e-6)
    printed(8, nlls[0], 3)
    printed(8, nlls[-1], 3)
    uniform = tensor(0.25, 0.25, 0.25, 0.25)
    assert field(OBJECTIVES["alpha"], uniform.log()[None], uniform).abs().max() < 1e-15


def test_09_stationary_points_are_r_times_gate() -> None:
    r = tensor(0.5, 0.3, 0.15, 0.05)
    for name, objective in OBJECTIVES.items():
        at_r = field(objective, r.log()[None], r)
        if name in ("nll", "eaft"):
            assert at_r.abs().max() < 1e-15
        else:
            assert at_r.abs().max() > 1e-3
    # Exactly when p_v is proportional to r_v g_v: for any p the r that has it as its stationary point.
    logits = random_logits(30, 4)
    for objective in OBJECTIVES.values():
        wanted = logits.softmax(-1) / gates(objective, logits)
        wanted = wanted / wanted.sum(-1, keepdim=True)
        assert field(objective, logits, wanted).abs().max() < 1e-14
        # Gates that grow with p_y: the ratio of two tokens is larger in p than in r.
        sharpening = (logits.softmax(-1) / wanted).gather(-1, logits.argsort(-1)).diff()
        if objective in (OBJECTIVES["p"], OBJECTIVES["alpha"], OBJECTIVES["deft"]):
            assert (sharpening > 0).all()
        if objective == OBJECTIVES["cayley"]:
            assert not (sharpening > 0).all()
    # And by the library's own gradient.
    z = r.log().repeat(4, 1).requires_grad_()
    loss = gated_loss(z, torch.arange(4), OBJECTIVES["deft"]).token_loss
    (gradient,) = torch.autograd.grad((r * loss).sum(), z)
    assert_close(-gradient.sum(0), field(OBJECTIVES["deft"], r.log()[None], r)[0])


def test_09_eaft_arrives_at_r() -> None:
    r = tensor(0.5, 0.3, 0.15, 0.05)
    starts = random_logits(5, 4)[:3]
    assert_close(flow(OBJECTIVES["eaft"], starts, r), r.expand(3, 4), 1e-6)


@pytest.mark.parametrize("name", ["p", "dft"])
def test_10_p_and_dft_go_to_the_most_frequent_label(name: str) -> None:
    r = tensor(0.5, 0.3, 0.2)
    starts = tensor(0, 0, 0, 0, 3, 0, -2, 1, 1).reshape(3, 3)
    p = starts.softmax(-1)
    assert_close(field(OBJECTIVES[name], starts, r), p * (r - (r * p).sum(-1, keepdim=True)))
    end = flow(OBJECTIVES[name], starts, r, steps=6000, step=2.0)
    assert (end[:, 0] > 0.99).all()
    # Slowly where the model gives it little.
    early = flow(OBJECTIVES[name], starts, r, steps=60)
    assert early[2, 0] < 0.1 < 0.8 < early[0, 0]


def test_11_deft_has_a_tipping_point() -> None:
    deft = OBJECTIVES["deft"]
    s = torch.linspace(0, 12, 1_200_001, dtype=DTYPE)
    resistance = s / (2 * torch.cosh(s / 2) ** 2)
    p = s.sigmoid()
    assert_close(resistance, (1 - settled(p)) * s)
    tip = resistance.max().item()
    majority = 1 / (1 + math.exp(-tip))
    printed(11, tip, 4)
    printed(11, 100 * majority, 3)

    starts = torch.stack([tensor(-3, 0, 0.3, 8), torch.zeros(4, dtype=DTYPE)], -1)
    for share in (0.52, 0.58, 0.605, 0.615, 0.65, 0.9):
        r = tensor(share, 1 - share)
        rho = math.log(share / (1 - share))
        rise = field(deft, torch.stack([s[::5000], torch.zeros_like(s[::5000])], -1), r)
        force = rho - resistance[::5000]
        decided = force.abs() > 1e-9
        assert torch.equal((rise[:, 0] > rise[:, 1])[decided], (force > 0)[decided])
        end = flow(deft, starts, r, steps=6000, step=1.0)[:, 0]
        if share > majority:
            assert (end > 0.99).all()
        else:
            assert (end[:3] < 0.8).all()
            assert (end[:3] > share).all()
            assert end[3] > torch.sigmoid(starts[3, 0])
            stationary = torch.stack([end, 1 - end], -1)[0]
            order = 1 / (1 - stationary.square().sum().item())
            assert_close(stationary, escort(r, order), 1e-4)
        if share == 0.58:
            printed(11, 100 * end[0].item(), 3)

    many = torch.cat([tensor(0.2), torch.full((20,), 0.04, dtype=DTYPE)])
    printed(11, flow(deft, many.log()[None], many)[0, 0].item(), 3)


def test_12_cayley_is_all_but_proper() -> None:
    p = torch.linspace(0, 1, 100_001, dtype=DTYPE)
    left = 2 * (1 - p) / (2 - p) * p.log()
    assert (left.diff() > 0).all()
    assert left[0] == -math.inf
    assert left[-1] == 0

    inner, odds = p[1:-1], left[1:-1] - left[1:-1].flip(0)  # The grid is symmetric, p and 1 - p.
    assert_close(inner.flip(0), 1 - inner)
    assert 0.0045 < (odds.sigmoid() - inner).abs().max() < 0.005

    r = torch.cat([tensor(0.4), torch.full((6,), 0.1, dtype=DTYPE)])
    stationary = cayley_stationary(r)
    assert_close(flow(OBJECTIVES["cayley"], random_logits(4, 7), r), stationary.expand(4, 7), 1e-5)
    printed(12, stationary[0].item(), 3)
    printed(12, stationary[1].item(), 3)

    floor = 0.25
    expected = cayley_stationary(escort(r, 1 / (1 - floor)))
    reached = flow(OBJECTIVES["cayley_trans"], random_logits(4, 7), r)
    assert_close(reached, expected.expand(4, 7), 1e-4)
    lopsided = tensor(0.9, 0.1)
    assert flow(OBJECTIVES["cayley_trans"], lopsided.log()[None], lopsided)[0, 0] < 0.99


def curl(objective: Objective, r: Tensor) -> float:
    """How far the Jacobian of the field is from symmetric, relative."""
    worst = 0.0
    for logits in random_logits(10, len(r))[:5]:
        jacobian = torch.stack(
            [
                (field(objective, (logits + h)[None], r) - field(objective, (logits - h)[None], r))[
                    0
                ]
                / 2e-5
                for h in 1e-5 * torch.eye(len(r), dtype=DTYPE)
            ]
        )
        worst = max(worst, ((jacobian - jacobian.T).norm() / jacobian.norm()).item())
    return worst


@pytest.mark.parametrize("r", [(0.5, 0.3, 0.2), (1.0, 0.0, 0.0)], ids=["three labels", "one label"])
def test_13_a_gate_of_p_alone_descends_its_potential_and_deft_descends_none(
    r: tuple[float, ...],
) -> None:
    for name in ("nll", "p", "dft", "alpha", "cayley", "cayley_trans"):
        assert curl(OBJECTIVES[name], tensor(*r)) < 1e-6, name
    assert curl(OBJECTIVES["deft"], tensor(*r)) > 0.01

    def potential(logits: Tensor) -> float:
        p = logits.softmax(-1).tolist()
        gate = lambda t: t ** (t / (2 - t)) / t  # noqa: E731
        return float(
            sum(share * mpmath.quad(gate, [x, 1]) for share, x in zip(r, p, strict=True) if share)
        )

    logits = tensor(0.3, -1.0, 0.5)
    slopes = [
        (potential(logits + h) - potential(logits - h)) / 2e-4 for h in 1e-4 * torch.eye(3).double()
    ]
    assert_close(tensor(*slopes), -field(OBJECTIVES["cayley"], logits[None], tensor(*r))[0], 1e-6)


def test_13_what_is_logged_is_not_what_is_descended() -> None:
    p = torch.linspace(0.001, 0.999, 999, dtype=DTYPE)
    statistics = TokenStatistics(p.log(), 100)
    logged = OBJECTIVES["dft"].loss(p.log(), statistics)
    assert_close(logged, -p * p.log())
    assert p[logged.argmax()].item() == pytest.approx(1 / math.e, abs=1e-3)
    assert logged.max() <= 1 / math.e
    tokens = tensor(0.98, 0.98, 0.98, 0.98, 0.05)
    result = gated_loss(torch.stack([tokens, 1 - tokens], -1).log(), torch.zeros(5).long(), "dft")
    nll = -result.log_p
    assert_close(result.token_loss.sum() / nll.sum(), (nll / nll.sum() * tokens).sum())
    printed(13, nll.mean().item(), 3)
    printed(13, result.loss.item(), 3)
    for name in ("cayley", "cayley_trans"):
        ratio = OBJECTIVES[name].gate(statistics) / p  # -Phi'
        assert (ratio.diff() < 0).all()  # Phi'' > 0
        logged = OBJECTIVES[name].loss(p.log(), statistics)
        slope = -torch.gradient(logged, spacing=(p,))[0]
        assert (slope / ratio - 1).abs().max() > 0.1


def test_14_the_cayley_trajectory() -> None:
    p = torch.linspace(0, 1, 10_001, dtype=DTYPE)
    c = OBJECTIVES["cayley"].focus(TokenStatistics(p.log(), 100))
    assert c is not None
    assert_close(c, torch.tanh(-(1 - p).log() / 2), 1e-11)
    assert_close((1 - c) / (1 + c), 1 - p)
    assert c[0] == 0
    assert c[-1] == 1
    assert (c.diff().diff() > 0).all()
    assert ((p / 2 <= c) & (c <= p)).all()
    slope = 2 / (2 - p) ** 2
    assert_close(torch.gradient(c, spacing=(p,))[0][1:-1], slope[1:-1], 1e-6)
    assert (slope.min(), slope.max()) == (0.5, 2)


def test_15_cayley_closes_no_gate() -> None:
    p = torch.linspace(1e-6, 1, 2_000_001, dtype=DTYPE)
    gate = gate_of(OBJECTIVES["cayley"], p)
    lowest = p[gate.argmin()]
    assert (lowest.log() - (lowest / 2 - 1)).abs() < 1e-5
    assert gate.min().item() == pytest.approx(math.exp(-lowest / 2), rel=1e-6)
    printed(15, lowest.item(), 3)
    printed(15, gate.min().item(), 3)
    printed(15, 100 * (1 - gate.min().item()), 2)

    small = 10.0 ** -torch.arange(3, 9, dtype=DTYPE)
    rest = gate_of(OBJECTIVES["cayley"], small) - (1 + small / 2 * small.log())
    assert (rest.abs() / (small * small.log()) ** 2).max() < 0.2
    u = 10.0 ** -torch.arange(1, 4, dtype=DTYPE)
    rest = gate_of(OBJECTIVES["cayley"], 1 - u) - (1 - u + 2 * u * u)
    assert (rest.abs() / u**3).max() < 5


@pytest.mark.parametrize("mean", [0.05, 0.5, 1.0])
def test_16_cayley_trans_is_its_floor(mean: float) -> None:
    p = torch.logspace(-8, 0, 400_001, dtype=DTYPE)
    objective = build_objective("cayley_trans", {"scope": "fixed", "mean_probability": mean})
    floor = mean / 2
    gate = gate_of(objective, p)
    cayley = gate_of(OBJECTIVES["cayley"], p)
    assert_close(gate, p**floor * cayley ** (1 - floor))
    assert ((0.7929 * p**floor <= gate) & (gate <= p**floor)).all()
    assert (objective.loss(p.log(), TokenStatistics(p.log(), 100)) <= 1 / floor).all()
    if mean >= 0.5:
        printed(16, p[gate < 0.1].max().item(), 3)


def test_17_renyi_and_shannon() -> None:
    logits = random_logits(300, 50)
    statistics = statistics_of(logits, logits.log_softmax(-1)[:, 0])
    collision, entropy = statistics.collision, statistics.entropy
    assert collision is not None
    assert entropy is not None
    assert (-collision.log() <= entropy).all()
    assert ((collision >= 1 / 50) & (collision <= 1)).all()
    uniform = torch.full((1, 7), 0.0, dtype=DTYPE)
    collision_of_uniform = statistics_of(uniform, uniform[:, 0]).collision
    assert collision_of_uniform is not None
    assert 1 / collision_of_uniform.item() == pytest.approx(7)


def test_18_focus_is_the_expected_probability() -> None:
    logits = random_logits(1, 12)
    labels = torch.multinomial(
        logits.softmax(-1)[0], 200_000, True, generator=torch.Generator().manual_seed(0)
    )
    result = gated_loss(logits.expand(len(labels), 12), labels, "deft")
    assert result.focus is not None
    p_y = result.log_p.exp()
    standard_error = p_y.std().item() / math.sqrt(len(labels))
    assert abs(p_y.mean() - result.focus.mean()) < 4 * standard_error
    # Sharper than the labels' distribution: focus above probability.
    sharper = gated_loss(2 * logits.expand(len(labels), 12), labels, "deft")
    assert sharper.focus is not None
    assert sharper.focus.mean() > sharper.log_p.exp().mean() + 10 * standard_error


def test_19_bounds_by_the_largest_probability() -> None:
    logits = random_logits(400, 20)
    p = logits.softmax(-1)
    largest = p.max(-1, keepdim=True).values
    collision = p.square().sum(-1, keepdim=True)
    assert (largest**2 <= collision * (1 + 1e-12)).all()
    assert (collision <= largest * (1 + 1e-12)).all()
    gate = gates(OBJECTIVES["deft"], logits)
    assert (p**largest <= gate * (1 + 1e-12)).all()
    assert (gate <= p ** (largest**2) * (1 + 1e-12)).all()
    assert (undecided(p, 20) <= collision * (1 + 1e-12)).all()
    assert (collision <= settled(p) * (1 + 1e-12)).all()


def test_20_which_gates_close() -> None:
    logits = torch.cat([random_logits(400, 20), 3 * random_logits(400, 20, seed=1)])
    p = logits.softmax(-1)
    nll, collision = -logits.log_softmax(-1), p.square().sum(-1, keepdim=True)
    gate = gates(OBJECTIVES["deft"], logits)
    closed = gate < 0.1
    assert 0.1 < closed.double().mean() < 0.9
    assert torch.equal(closed, collision * nll > math.log(10))
    printed(20, math.log(10), 4)
    largest = p.max(-1, keepdim=True).values
    assert (p[closed] < 0.1).all()
    assert (largest.expand_as(p)[closed] > (math.log(10) / nll)[closed]).all()
    first = gate.gather(-1, p.argmax(-1, keepdim=True))
    lowest = math.exp(-1 / math.e)
    printed(20, lowest, 3)
    assert (first >= lowest).all()
    # Nearly reached: one token of 1/e, the rest on as large ones as fit below it.
    rest = tensor(1 / math.e, 1 / math.e, 1 - 2 / math.e).log()[None]
    assert gates(OBJECTIVES["deft"], rest)[0, 0] < lowest + 0.02

    uniform = gate_of(OBJECTIVES["deft"], tensor(1 / 151_936), tensor(1 / 151_936)).item()
    assert uniform == pytest.approx(151_936 ** (-1 / 151_936), rel=1e-12)
    printed(20, uniform, 5)


def test_21_where_deft_pulls_hardest() -> None:
    deft = OBJECTIVES["deft"]
    p = torch.logspace(math.log10(1 / 150_000), 0, 200_001, dtype=DTYPE)
    pull = gate_of(deft, p, undecided(p)) * (1 - p)
    assert pull[0] > 0.999
    assert (pull.diff() < 0).all()
    p = torch.linspace(1e-6, 1, 1_000_001, dtype=DTYPE)
    pull = gate_of(deft, p, settled(p)) * (1 - p)
    assert pull[0] < 1e-5
    printed(21, p[pull.argmax()].item(), 3)
    printed(21, pull.max().item(), 3)


def undetached(logits: Tensor, target: int) -> Tensor:
    log_p = logits.log_softmax(-1)
    return deformed_log_loss(log_p[target], (2 * log_p).logsumexp(-1).exp())


def undetached_gradient(logits: Tensor, target: int) -> Tensor:
    """Statement (22)."""
    p = logits.softmax(-1)
    collision = p.square().sum()
    x = -collision * p[target].log()
    gate = (-x).exp()
    by_focus = -(1 - (1 + x) * (-x).exp()) / collision**2
    error = p - torch.eye(len(p), dtype=DTYPE)[target]
    return gate * error + by_focus * 2 * p * (p - collision)


def test_22_the_undetached_gradient_has_another_term() -> None:
    for row in random_logits(30, 8):
        logits = row.clone().requires_grad_()
        (by_autograd,) = torch.autograd.grad(undetached(logits, 3), logits)
        assert_close(by_autograd, undetached_gradient(row, 3), 1e-10)
        (detached,) = torch.autograd.grad(
            gated_loss(logits[None], torch.tensor([3]), "deft").loss, logits
        )
        assert (by_autograd - detached).norm() > 0.01 * detached.norm()
        # dL/da <= 0.
        focus = row.softmax(-1).square().sum().requires_grad_()
        log_p = row.log_softmax(-1)[3]
        assert torch.autograd.grad(deformed_log_loss(log_p, focus), focus)[0] <= 0


def test_23_the_other_term_sharpens_also_on_the_wrong_token() -> None:
    for row in random_logits(30, 8):
        p = row.softmax(-1)
        collision, cubes = p.square().sum(), (p**3).sum()
        assert cubes >= collision**2 * (1 - 1e-12)
        error = p - torch.eye(8, dtype=DTYPE)[3]
        gate = p[3] ** collision
        other = -(undetached_gradient(row, 3) - gate * error)
        # A step along it raises C2.
        assert (other * 2 * p * (p - collision)).sum() >= -1e-15
        x = -collision * p[3].log()
        size = (1 - (1 + x) * (-x).exp()) / collision**2
        expected = gate * error.square().sum() - size * 2 * (
            p[3] * (collision - p[3]) + cubes - collision**2
        )
        assert_close((-error * -undetached_gradient(row, 3)).sum(), expected, 1e-10)

    logits = tensor(0.9, 0.099, 0.001).log()
    stepped = logits - 0.1 * undetached_gradient(logits, 2)
    assert undetached(stepped, 2) < undetached(logits, 2)
    assert stepped.log_softmax(-1)[2] < logits.log_softmax(-1)[2]
    assert stepped.log_softmax(-1)[0] > logits.log_softmax(-1)[0]
    detached = logits[None].clone().requires_grad_()
    gated_loss(detached, torch.tensor([2]), "deft").loss.backward()  # type: ignore[no-untyped-call]
    assert detached.grad is not None
    learnt = logits - 0.1 * detached.grad[0]
    assert learnt.log_softmax(-1)[2] > logits.log_softmax(-1)[2]

    p = torch.linspace(1e-5, 0.99999, 999_999, dtype=DTYPE)
    loss = OBJECTIVES["deft"].loss(p.log(), TokenStatistics(p.log(), 2, collision=settled(p)))
    top = loss.argmax()
    printed(23, p[top].item(), 3)
    assert (loss[: top + 1].diff() > 0).all()
    assert (loss[top:].diff() < 0).all()


def test_24_bounded_influence() -> None:
    log_p = tensor(-1, -10, -100, -1000)
    for a in (0.1, 0.5, 1.0):
        losses = deformed_log_loss(log_p, tensor(a))
        assert (losses <= 1 / a).all()
    assert_close(deformed_log_loss(log_p, tensor(0.0)), -log_p)
    for flat in (True, False):
        for depth in (5.0, 15.0, 25.0):
            logits = torch.zeros(1, 9, dtype=DTYPE)
            logits[0, 0] = -depth
            logits[0, 1] = 0.0 if flat else 60.0 - depth
            norms = {}
            for name in ("nll", "alpha", "deft"):
                z = logits.clone().requires_grad_()
                result = gated_loss(z, torch.tensor([0]), OBJECTIVES[name])
                (gradient,) = torch.autograd.grad(result.loss, z)
                norms[name] = gradient.norm().item()
                assert norms[name] <= math.sqrt(2) * result.gate.item() * (1 + 1e-12)
            assert 1 - 1e-2 < norms["nll"] < math.sqrt(2) + 1e-12
            assert norms["alpha"] < 1.42 * math.exp(result.log_p.item() / 2)
            # Eight others as likely as one another, or one that the model is sure of.
            assert norms["deft"] > 0.03 if flat else norms["deft"] < 1e-6


def test_25_noisy_labels() -> None:
    r = tensor(0.9, 0.1)
    optimum = escort(r, 1 / (1 - 0.5))
    assert_close(optimum[0] / optimum[1], (r[0] / r[1]) ** 2)
    printed(25, 100 * optimum[1].item(), 2)

    noise, clean = 0.3, tensor(0.5, 0.3, 0.2)
    noisy = (1 - noise) * clean + noise / 3
    log_p = random_logits(20, 3).log_softmax(-1)
    linear = deformed_log_loss(log_p, tensor(1.0))
    assert_close(linear.sum(-1), torch.full((20,), 2.0, dtype=DTYPE))
    shifted = (1 - noise) * (clean * linear).sum(-1) + noise / 3 * 2
    assert_close((noisy * linear).sum(-1), shifted)
    nll = deformed_log_loss(log_p, tensor(0.0)).sum(-1)
    assert nll.std() > 1


def test_26_bounds_of_eaft() -> None:
    top_k, full = build_objective("eaft"), build_objective("eaft", {"entropy": "full"})
    logits = torch.cat([torch.zeros(1, 50, dtype=DTYPE), random_logits(60, 50)])
    sharp = torch.full((1, 50), -2000.0, dtype=DTYPE)
    sharp[0, 7] = 0
    logits = torch.cat([logits, sharp])
    for target in (7, 8):
        targets = torch.full((len(logits),), target)
        weights = gated_loss(logits, targets, top_k).gate
        assert weights.max().item() == pytest.approx(math.log(20) / 3, rel=1e-12)
        assert weights[-1] == 0
        whole = gated_loss(logits, targets, full).gate
        assert whole.max().item() == pytest.approx(1, rel=1e-12)
        assert whole[-1] == 0
    printed(26, math.log(20) / 3, 4)
    assert torch.equal(weights, gated_loss(logits, torch.zeros_like(targets), top_k).gate)


def learning_time(gate: Callable[[Tensor], Tensor], start: float, factor: float = 1.0) -> float:
    """Statement (27) up to p_1 = 1/2: over the log-odds, where dt / (t (1 - t)) is even."""
    s = torch.linspace(math.log(start / (1 - start)), 0, 100_001, dtype=DTYPE)
    p = s.sigmoid()
    return factor * torch.trapezoid(1 / (gate(p) * (1 - p)), s).item()


@pytest.mark.parametrize("name", ["nll", "cayley_trans", "deft", "dft"])
def test_27_time_to_learn_a_token(name: str) -> None:
    objective = OBJECTIVES[name]
    vocab_size, start = 30, 0.01
    logits = torch.full((1, vocab_size), math.log((1 - start) / (vocab_size - 1)), dtype=DTYPE)
    logits[0, 0] = math.log(start)
    step, time = 0.002, 0.0
    target = torch.zeros(vocab_size, dtype=DTYPE)
    target[0] = 1
    while logits.softmax(-1)[0, 0] < 0.5:
        log_p = logits.log_softmax(-1)[:, 0]
        gate = objective.gate(statistics_of(logits, log_p))
        logits = logits + step * gate * (target - logits.softmax(-1))
        time += step
        if gate < 0.1:  # The p gate's long beginning.
            step = 0.02
    rest = logits[0, 1:]
    assert rest.max() - rest.min() < 1e-9
    predicted = learning_time(
        lambda p: gate_of(objective, p, undecided(p, vocab_size)),
        start,
        (vocab_size - 1) / vocab_size,
    )
    assert time == pytest.approx(predicted, rel=0.01)


def test_27_orders_of_growth_and_the_table() -> None:
    for a in (0.25, 0.5, 1.0):
        gate = build_objective("alpha", {"a": a})
        start = 1e-12
        grown = learning_time(lambda p, gate=gate: gate_of(gate, p), start)
        assert grown / (start**-a / a) == pytest.approx(1, abs=0.03)
    plain = [learning_time(torch.ones_like, start) for start in (1e-4, 1e-8)]
    assert plain[1] - plain[0] == pytest.approx(math.log(1e4), rel=1e-3)

    columns: list[Callable[[Tensor], Tensor]] = [
        lambda p: gate_of(OBJECTIVES["cayley"], p),
        lambda p: gate_of(OBJECTIVES["cayley_trans"], p),
        lambda p: gate_of(OBJECTIVES["deft"], p, undecided(p)),
        lambda p: gate_of(OBJECTIVES["deft"], p, settled(p)),
        lambda p: gate_of(OBJECTIVES["dft"], p),
    ]
    rows = re.findall(r"^\| (0\.0\d*) \| (.*) \|$", STATEMENTS["27"], re.MULTILINE)
    assert len(rows) == 2
    for start, cells in rows:
        nll = learning_time(torch.ones_like, float(start))
        expected = [
            f"{learning_time(gate, float(start)) / nll:#.3g}".rstrip(".") for gate in columns
        ]
        assert cells.split(" | ") == expected


def trained(
    optimizer: type[torch.optim.Optimizer], scale: float, clip: float | None, **settings: float
) -> Tensor:
    """Logits of three tokens after twenty steps on DEFT, its loss multiplied by `scale`."""
    logits = random_logits(3, 6).requires_grad_()
    steps = optimizer([logits], lr=0.1, **settings)  # type: ignore[call-arg]
    for _ in range(20):
        steps.zero_grad()
        (scale * gated_loss(logits, torch.tensor([0, 1, 2]), "deft").loss).backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([logits], clip)
        steps.step()
    return logits.detach()


def test_28_adam_sees_ratios() -> None:
    adam, sgd = torch.optim.Adam, torch.optim.SGD
    assert_close(trained(adam, 0.1, None, eps=0), trained(adam, 1.0, None, eps=0), 1e-9)
    assert (trained(adam, 1e-7, None) - trained(adam, 1.0, None)).abs().max() > 0.1
    assert (trained(sgd, 0.1, None) - trained(sgd, 1.0, None)).abs().max() > 0.1
    # A threshold that only the larger gradients meet.
    clip = 0.1
    assert_close(trained(adam, 0.1, clip, eps=0), trained(adam, 0.1, None, eps=0), 1e-12)
    assert (trained(adam, 1.0, clip, eps=0) - trained(adam, 1.0, None, eps=0)).abs().max() > 1e-3
    # The shares of tokens do change the update.
    logits = random_logits(3, 6)
    targets = torch.tensor([0, 1, 2])
    directions = []
    for name in ("nll", "deft"):
        weight = torch.zeros(6, dtype=DTYPE, requires_grad=True)  # Shared by the three tokens.
        gated_loss(logits + weight, targets, name).loss.backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        directions.append(weight.grad / weight.grad.norm())
    assert directions[0] @ directions[1] < 0.999


def test_every_statement_has_a_test_and_every_test_a_statement() -> None:
    tested = {match[1] for name in globals() if (match := re.match(r"test_(\d+)_", name))}
    assert {int(number) for number in tested} == {int(number) for number in STATEMENTS}
    assert list(STATEMENTS) == [str(number) for number in range(1, len(STATEMENTS) + 1)]
