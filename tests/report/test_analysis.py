"""Numbers of the report against the definition of each objective, by autograd in float64."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deft_plugin import Objective, TokenStatistics, build_objective, register_objective
from deft_plugin.objectives import registry
from deft_plugin.ops.reference import reference_token_loss
from deft_plugin.ops.sums import StatisticsRequest
from deft_plugin.report.analysis import (
    BAND_EDGES,
    check_objectives,
    effects_of,
    error_of_mean,
    gates_of,
    gradient_lengths,
    gradient_map_of,
    groups_of_equal_gates,
    standing_of,
)
from deft_plugin.report.changes import changes_between
from deft_plugin.report.choices import DEFAULT_OBJECTIVES
from deft_plugin.report.measurement import TokenTable, statistics_of_logits
from deft_plugin.report.regimes import REGIMES, regime_of

COUNT, VOCABULARY = 400, 60


def table_of(logits: Tensor, targets: Tensor, rows: Tensor | None = None) -> TokenTable:
    """A table of tokens with these logits."""
    tokens = statistics_of_logits(logits, targets, top_ks=[20])
    at = torch.arange(len(targets))
    return TokenTable(
        row=torch.zeros_like(at) if rows is None else rows,
        position=at + 1,
        target=targets,
        **vars(tokens),
    )


@pytest.fixture
def logits() -> Tensor:
    """From nearly uniform to nearly certain, in float64."""
    generator = torch.Generator().manual_seed(0)
    peaked = torch.rand(COUNT, 1, generator=generator) * 8
    return torch.randn(COUNT, VOCABULARY, generator=generator).double() * peaked


@pytest.fixture
def targets(logits: Tensor) -> Tensor:
    """Likely ones and unlikely ones."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return torch.where(torch.arange(COUNT) % 3 == 0, torch.arange(COUNT) % VOCABULARY, drawn)


def gradients_by_autograd(name: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Length of the gradient of each token's loss in its logits."""
    objective = build_objective(name).at_mean(None)
    logits = logits.clone().requires_grad_()
    request = StatisticsRequest(collision=True, entropy=True, top_k=objective.top_k)
    losses, _ = reference_token_loss(logits, targets, objective, request)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    return gradient.norm(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*DEFAULT_OBJECTIVES, "alpha"])
def test_gradients_and_their_shares_are_those_of_autograd(
    name: str, dtype: torch.dtype, logits: Tensor, targets: Tensor
) -> None:
    table = table_of(logits.to(dtype), targets)
    gates = gates_of(table, [name])
    lengths = gradient_lengths(table, gates[name])
    expected = gradients_by_autograd(name, logits, targets)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(lengths, expected, rtol=tolerance, atol=1e-7)

    (effect,) = effects_of(table, gates)
    p = logits.softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1).numpy()
    band = np.digitize(p, BAND_EDGES[1:-1])
    shares = [float(expected.numpy()[band == b].sum() / expected.sum()) for b in range(6)]
    assert effect.gradient_by_band == pytest.approx(shares, abs=1e-5)
    gate = gates[name].numpy()
    assert effect.mean_gate == pytest.approx(gate.mean(), rel=1e-5)
    assert effect.closed_share == pytest.approx((gate < 0.1).mean())
    nll = gradients_by_autograd("nll", logits, targets).numpy()
    assert effect.closed_share_of_nll == pytest.approx(nll[gate < 0.1].sum() / nll.sum(), abs=1e-5)
    means = [gate[band == b].mean() for b in range(6)]
    assert effect.gate_by_band == pytest.approx(means, rel=1e-4)


def test_the_map_of_gradients_has_the_mean_of_each_cell(logits: Tensor, targets: Tensor) -> None:
    table = table_of(logits, targets)
    gates = gates_of(table, ["deft", "nll"])
    found = gradient_map_of(table, gates, columns=4, rows=3)
    lengths = gradients_by_autograd("deft", logits, targets)
    p_edges, e_edges = found.probability_edges, found.entropy_edges
    for row, means in enumerate(found.means["deft"]):
        for column, mean in enumerate(means):
            inside = (table.p >= p_edges[column]) & (table.entropy >= e_edges[row])
            inside &= (table.p < p_edges[column + 1]) | (column == 3)
            inside &= (table.entropy < e_edges[row + 1]) | (row == 2)
            if mean is None:
                assert not inside.any()
            else:
                assert mean == pytest.approx(float(lengths[inside].mean()), rel=1e-6)


def test_where_the_data_stands(logits: Tensor, targets: Tensor) -> None:
    table = table_of(logits, targets)
    standing = standing_of(table)
    p = logits.softmax(1)
    log_p = logits.log_softmax(1).gather(1, targets.unsqueeze(1))
    assert standing.tokens == COUNT
    assert standing.nll == pytest.approx(-float(log_p.mean()))
    assert standing.perplexity == pytest.approx(math.exp(-float(log_p.mean())))
    assert standing.mean_focus == pytest.approx(float(p.square().sum(1).mean()))
    assert standing.accuracy == pytest.approx(float((p.argmax(1) == targets).double().mean()))
    for histogram in (standing.probability, standing.focus, standing.entropy):
        assert sum(histogram.shares) == pytest.approx(1)
        assert len(histogram.edges) == len(histogram.shares) + 1
    assert sum(standing.band_shares) == pytest.approx(1)


@pytest.mark.parametrize(
    ("mean", "name"),
    [(0.0, "weak"), (0.2, "weak"), (0.35, "intermediate"), (0.59, "intermediate"), (0.605, "strong"), (0.66, "strong"), (1.0, "strong")],
)  # fmt: skip
def test_the_nearest_of_the_papers_regimes(mean: float, name: str) -> None:
    assert regime_of(mean).name == f"{name} prior"


def test_the_error_of_a_mean_takes_rows_as_drawn() -> None:
    """Against the spread of means over samples of rows whose tokens are alike."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(30).repeat_interleave(10)

    def draw() -> Tensor:
        row_means = torch.randn(30, 1, generator=generator)
        return (row_means + 0.1 * torch.randn(30, 10, generator=generator)).flatten()

    spread = torch.stack([draw().mean() for _ in range(400)]).std()
    errors = torch.tensor([error_of_mean(draw(), rows) for _ in range(50)])
    assert float(errors.mean()) == pytest.approx(float(spread), rel=0.1)
    assert error_of_mean(torch.ones(4), torch.zeros(4, dtype=torch.long)) is None


def test_tokens_that_are_all_certain_have_no_gradient_to_share() -> None:
    logits = torch.full((5, VOCABULARY), -torch.inf)
    logits[:, 3] = 0.0
    table = table_of(logits, torch.full((5,), 3))
    gates = gates_of(table, DEFAULT_OBJECTIVES)
    assert standing_of(table).mean_focus == 1
    for effect in effects_of(table, gates):
        assert effect.gradient_by_band is None
        assert effect.closed_share_of_nll is None
        assert effect.gate_by_band[:-1] == [None] * 5


def test_objectives_with_the_same_gate_are_drawn_once(logits: Tensor, targets: Tensor) -> None:
    gates = gates_of(table_of(logits, targets), DEFAULT_OBJECTIVES)
    groups = groups_of_equal_gates(gates)
    assert groups["p"] == ["p", "dft"]
    assert [*groups] == [name for name in DEFAULT_OBJECTIVES if name != "dft"]


def test_unknown_objectives_are_answered_with_the_choices() -> None:
    assert check_objectives(["nll"], "deft") == ["nll", "deft"]
    with pytest.raises(ValueError, match=r"--objectives 'def' is unknown\. Choices: .*deft"):
        check_objectives(["def"], "deft")
    with pytest.raises(ValueError, match=r"--objective 'def' is unknown\. Choices: .*deft"):
        check_objectives(["nll"], "def")
    with pytest.raises(ValueError, match=r"--objectives names none\. Choices: .*deft"):
        check_objectives([], "deft")


def test_own_objectives(logits: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without documentation, whose gates are 3; and one whose gate is no number."""
    monkeypatch.setattr(registry, "_OBJECTIVES", dict(registry._OBJECTIVES))

    @register_objective("thrice")
    class Thrice(Objective):
        def loss(self, log_p: Tensor, statistics: TokenStatistics) -> Tensor:
            return -3 * log_p

    @register_objective("damaged")
    class Damaged(Objective):
        def loss(self, log_p: Tensor, statistics: TokenStatistics) -> Tensor:
            return log_p * math.nan

    table = table_of(logits, targets)
    (effect,) = effects_of(table, gates_of(table, ["thrice"]))
    assert (effect.description, effect.mean_gate, effect.closed_share) == ("", 3.0, 0.0)
    with pytest.raises(ValueError, match=r"--objectives 'damaged': its gate is not finite at"):
        gates_of(table, ["nll", "damaged"])


def test_changes_between_two_checkpoints() -> None:
    """By hand: three tokens over two outcomes."""
    before = torch.tensor([0.05, 0.6, 0.95])
    after = torch.tensor([0.55, 0.3, 0.96])
    tables = [
        table_of(torch.stack([p, 1 - p], 1).log(), torch.zeros(3, dtype=torch.long))
        for p in (before, after)
    ]
    changes = changes_between(*tables)
    assert (changes.learned, changes.forgotten) == pytest.approx((1 / 3, 1 / 3))
    assert (changes.became_first, changes.stopped_being_first) == pytest.approx((1 / 3, 1 / 3))
    low, middle, high = (changes.bands[band] for band in (1, 3, 4))
    assert (low.tokens, low.learned, low.forgotten) == (1, 1.0, 0.0)
    assert low.nll_change == pytest.approx(math.log(0.05 / 0.55), rel=1e-5)
    assert (middle.learned, middle.forgotten) == (0.0, 1.0)
    assert middle.probability_change == pytest.approx(-0.3, rel=1e-5)
    assert (high.learned, high.forgotten) == (0.0, 0.0)
    assert changes.bands[0].learned is None


def test_the_own_studys_figures_are_those_of_its_page() -> None:
    page = Path(__file__).parents[2].joinpath("docs/study.md").read_text()
    for regime in REGIMES:
        assert "docs/study.md" in regime.own_finding
        figures = re.findall(
            r"\d+\.\d+(?: ± \d+\.\d+)?", regime.own_finding.replace("3.5 million", "")
        )
        assert figures
        assert not [figure for figure in figures if figure not in page]
