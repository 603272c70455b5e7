"""`skip_below`: what the gradients' products lose is at most that share of the gradient in the logits, and less is multiplied."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from deft_plugin import linear_gated_loss
from deft_plugin.ops import skipping
from deft_plugin.ops.fold import TargetEntry
from deft_plugin.ops.skipping import column_masses, what_earns

from .cases import DEVICE, TILED_PATHS, Case, gated, gradients, largest_error, random_case
from .test_costs import Recorder

NAMES = ["nll", "deft", "cayley_trans", "eaft"]
SHARES = [2**-3, 2**-6, 2**-9]


@pytest.fixture(autouse=True)
def _narrow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies here are smaller than what a GPU's products take together."""
    monkeypatch.setattr(skipping, "COLUMNS_MULTIPLE", 4)


def language_like(**changes: Any) -> Case:
    """Logits that are the hidden states themselves, most of the probability on few of 96 entries.

    So the hidden states' gradient is the gradient in the logits, without rounding.
    """
    case = random_case(40, 96, identity=True, masked_share=0.2, logit_std=(2.0, 12.0), **changes)
    with torch.no_grad():
        # Frequent words.
        case.hidden[:, :12] += 6
    return case


def settled(case: Case) -> Case:
    """All but the first 20 tokens predicted with p next to 1."""
    right = case.logits().detach().argmax(1)
    known = (case.targets != -100) & (torch.arange(right.numel(), device=right.device) >= 20)
    with torch.no_grad():
        case.hidden[known] *= 30
    return dataclasses.replace(case, targets=torch.where(known, right, case.targets))


def absolute_sums(gradient: Tensor, tile_rows: int, mask: Tensor) -> Tensor:
    """Sum of absolute values of each tile of valid tokens."""
    return torch.stack([part.abs().sum() for part in gradient[mask].split(tile_rows)])


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize(
    ("name", "share", "tile_rows", "changes"),
    [
        *((name, share, 40, {}) for name in NAMES for share in SHARES),
        *(("deft", 2**-6, tile_rows, {}) for tile_rows in (1, 7)),
        ("deft", 2**-6, 16, {"bias": True}),
        ("nll", 2**-6, 16, {"logit_scale": -0.7}),
        ("cayley_trans", 2**-6, 16, {"softcap": 8.0, "bias": True}),
    ],
)
@pytest.mark.parametrize("is_settled", [False, True])
def test_what_is_lost_of_each_tile_is_at_most_the_share(
    path: str, name: str, share: float, tile_rows: int, changes: dict[str, Any], is_settled: bool
) -> None:
    case = language_like(trainable=["hidden"], **changes)
    case = settled(case) if is_settled else case
    exact = gated(path, case, name, tile_rows=tile_rows)
    result = gated(path, case, name, tile_rows=tile_rows, skip_below=share)
    assert torch.equal(result.token_loss, exact.token_loss)
    (whole,), (kept,) = gradients(exact.loss, case), gradients(result.loss, case)
    lost = absolute_sums(whole - kept, tile_rows, result.mask)
    assert (lost <= share * absolute_sums(whole, tile_rows, result.mask) * (1 + 1e-9)).all()
    # What stays is what it was, and what goes is gone.
    assert torch.allclose(kept[kept != 0], whole[kept != 0], rtol=1e-9, atol=0)
    assert result.skipped is not None
    gone = ((kept == 0) & (whole != 0))[result.mask].double().mean()
    assert gone <= result.skipped[result.mask].double().mean() + 1e-6


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_out_most_of_a_vocabulary_that_gets_little_probability(
    path: str, name: str
) -> None:
    case = language_like(trainable=["hidden", "weight"])
    with Recorder() as whole:
        exact = gated(path, case, name, tile_rows=40)
    with Recorder() as part:
        result = gated(path, case, name, tile_rows=40, skip_below=2**-6)
    assert result.skipped is not None
    share = result.skipped[result.mask].mean()
    assert share > 0.25
    # The gradients' products, less what was left out; the column masses are a product of one column.
    count, vocab_size = int(result.mask.sum()), case.weight.size(0)
    gradients_products = 2 * count * vocab_size * case.hidden.size(1)
    expected = whole.multiplications - share * gradients_products + count * vocab_size
    assert part.multiplications == pytest.approx(float(expected), rel=1e-6)
    assert largest_error(gradients(result.loss, case), gradients(exact.loss, case)) < 2**-4


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_next_to_no_gradient_leave_as_rows(path: str, name: str) -> None:
    case = settled(language_like(trainable=["hidden", "weight", "bias"], bias=True))
    exact = gated(path, case, name)
    result = gated(path, case, name, skip_below=2**-6)
    assert result.skipped is not None
    rows = result.skipped == 1
    assert rows.sum() >= 8
    assert not (rows & ~result.mask).any()
    hidden, weight, bias = gradients(result.loss, case)
    assert (hidden[rows] == 0).all()
    # One error for all the gradients.
    assert largest_error([weight, bias], [hidden.T @ case.hidden, hidden.sum(0)]) < 1e-9
    assert largest_error([hidden], gradients(exact.loss, case)[:1]) < 2**-4


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_its_rounding_and_the_share(
    path: str, dtype: torch.dtype
) -> None:
    case = language_like(trainable=["hidden", "weight"]).to(dtype)
    exact = gradients(gated(path, case).loss, case)
    result = gated(path, case, skip_below=2**-7)
    assert result.skipped is not None
    assert result.skipped.mean() > 0.2
    assert largest_error(gradients(result.loss, case), exact) < 2**-5


@pytest.mark.parametrize("weights", ["equal", "different", "negative"])
@pytest.mark.parametrize("path", TILED_PATHS)
def test_upstream_gradients_that_differ_between_tokens_are_part_of_the_weights_share(
    path: str, weights: str
) -> None:
    case = language_like(trainable=["hidden", "weight"])
    upstream = torch.ones(40, dtype=torch.float64, device=DEVICE)
    if weights != "equal":
        upstream = torch.logspace(-3, 3, 40, dtype=torch.float64, device=DEVICE)
    if weights == "negative":
        upstream = -upstream
    exact = gradients(gated(path, case).token_loss @ upstream, case)
    actual = gradients(gated(path, case, skip_below=2**-9).token_loss @ upstream, case)
    assert largest_error(actual, exact) < 2**-7


@pytest.mark.parametrize("share", SHARES[:2])
def test_masses_are_those_of_the_formula(share: float) -> None:
    case = language_like()
    keep = case.targets != -100
    targets, logits = case.targets[keep], case.logits().detach()[keep]
    gate = torch.linspace(-1, 1, targets.numel(), dtype=torch.float64, device=DEVICE)
    error = torch.softmax(logits, 1)
    error[torch.arange(targets.numel()), targets] -= 1
    exact = (gate.unsqueeze(1) * error).abs()
    entry = TargetEntry.of(error, targets, None)
    masses = column_masses(error, gate.abs(), entry)
    torch.testing.assert_close(masses, exact.sum(0), rtol=1e-12, atol=1e-15)
    kept = what_earns(error, gate, exact.sum(1), targets, share)
    assert kept.columns is not None
    assert set(targets.tolist()) <= set(kept.columns.tolist())
    gone = torch.ones_like(exact, dtype=torch.bool)
    rows = slice(None) if kept.rows is None else kept.rows
    gone[rows] = gone[rows].index_fill(1, kept.columns, False)
    assert exact[gone].sum() <= share * exact.sum()


@pytest.mark.parametrize("path", TILED_PATHS)
def test_off_by_default(path: str) -> None:
    assert gated(path, language_like()).skipped is None


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_not_skipped(path: str, value: float) -> None:
    case = language_like(trainable=["hidden"])
    with torch.no_grad():
        case.hidden[3] = value
    case.targets[3] = 1
    result = gated(path, case, skip_below=2**-3)
    assert result.loss.isnan()
    assert gradients(result.loss, case)[0][3].isnan().all()


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("masked_share", [0.0, 1.0])
@pytest.mark.parametrize("count", [0, 1])
def test_next_to_nothing_to_skip(path: str, masked_share: float, count: int) -> None:
    case = random_case(count, 3, masked_share=masked_share)
    exact = gradients(gated(path, case).loss, case)
    actual = gradients(gated(path, case, skip_below=0.5).loss, case)
    for gradient, truth in zip(actual, exact, strict=True):
        assert (gradient - truth).abs().sum() <= 0.5 * truth.abs().sum() + 1e-12


@pytest.mark.parametrize("path", TILED_PATHS)
def test_gates_that_are_all_closed_skip_nothing(path: str) -> None:
    weight = 300 * torch.eye(8, device=DEVICE)
    targets = torch.arange(8, device=DEVICE).roll(1)
    hidden = torch.eye(8, device=DEVICE).requires_grad_()
    result = linear_gated_loss(hidden, weight, targets, "p", path=path, skip_below=0.5)  # type: ignore[arg-type]
    result.loss.backward()
    assert result.skipped is not None
    assert not result.skipped.any()
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("skip_below", [-0.1, 1.0, float("nan"), True, "0.1"])
def test_a_share_outside_its_range_is_refused(skip_below: Any) -> None:
    with pytest.raises(ValueError, match=r"skip_below is .*\[0, 1\)"):
        gated("chunked", random_case(2, 3), skip_below=skip_below)


def test_the_reference_refuses_what_it_would_ignore() -> None:
    with pytest.raises(ValueError, match="skip_below would be ignored"):
        gated("reference", random_case(2, 3), skip_below=0.1)


@pytest.mark.parametrize("path", TILED_PATHS)
def test_float16_counts_gates_that_are_small_and_many(path: str) -> None:
    """One token with an open gate, and 500 of which each has next to nothing and all together half."""
    count, vocab_size = 500, 64
    hidden = torch.full((count, vocab_size), -30.0)
    hidden[0, 0], hidden[0, 1:9] = 12, 0
    hidden[1:, 9:], hidden[1:, 0] = 0, -13.4
    hidden = hidden.half().to(DEVICE)
    weight = torch.eye(vocab_size, dtype=torch.float16, device=DEVICE)
    targets = torch.zeros(count, dtype=torch.long, device=DEVICE)

    def gradient(**options: Any) -> Tensor:
        leaf = hidden.clone().requires_grad_()
        loss = linear_gated_loss(leaf, weight, targets, "p", path=path, tile_rows=1000, **options)  # type: ignore[arg-type]
        # Scaled as float16 is trained with.
        (2.0**14 * loss.loss).backward()
        assert leaf.grad is not None
        return leaf.grad.float()

    exact, kept = gradient(), gradient(skip_below=2**-6)
    assert (exact - kept).abs().sum() <= 2**-6 * exact.abs().sum()


def test_without_gradients_nothing_is_skipped_and_no_share_is_told() -> None:
    with torch.no_grad():
        assert gated("chunked", language_like(), skip_below=2**-3).skipped is None


def test_the_share_has_the_statistics_dtype() -> None:
    result = gated("chunked", language_like(), skip_below=2**-3)
    assert result.skipped is not None
    assert result.skipped.dtype == result.log_p.dtype == torch.float64
