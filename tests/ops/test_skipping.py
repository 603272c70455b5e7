"""`skip_below`: tokens whose gradient is lost in rounding earn no product, and the result says which."""

from __future__ import annotations

import pytest
import torch

from deft_plugin import linear_gated_loss
from deft_plugin.ops.output import gradient_bound

from .cases import DEVICE, TILED_PATHS, Case, gated, gradients, largest_error, random_case


def half_settled(trainable: list[str]) -> Case:
    """Tokens of which a good part is predicted with p = 1 up to rounding."""
    case = random_case(64, 40, masked_share=0.2, logit_std=(1.0, 300.0), trainable=trainable)
    right = case.logits().detach().argmax(1)
    kept = (case.targets != -100) & (torch.arange(64, device=right.device) >= 20)
    return Case(case.hidden, case.weight, torch.where(kept, right, case.targets))


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("trainable", [["hidden"], ["hidden", "weight"]])
@pytest.mark.parametrize("name", ["nll", "deft", "cayley_trans"])
def test_what_is_skipped_is_small_and_named(path: str, trainable: list[str], name: str) -> None:
    case = half_settled(trainable)
    exact = gated(path, case, name)
    result = gated(path, case, name, skip_below=2**-12, tile_rows=16)
    assert result.skipped is not None
    assert result.skipped.sum() >= 8
    assert not (result.skipped & ~result.mask).any()
    assert torch.equal(result.token_loss, exact.token_loss)

    bound = gradient_bound(exact.log_p, exact.gate)
    assert bound[result.skipped].sum() < 2**-12 * bound.sum()
    actual = gradients(result.loss, case)
    assert (actual[0][result.skipped] == 0).all()
    assert largest_error(actual, gradients(exact.loss, case)) < 2**-11


@pytest.mark.parametrize("path", TILED_PATHS)
def test_off_by_default(path: str) -> None:
    assert gated(path, half_settled(["hidden"])).skipped is None


@pytest.mark.parametrize("path", TILED_PATHS)
def test_nan_is_not_skipped(path: str) -> None:
    case = half_settled(["hidden"])
    with torch.no_grad():
        case.hidden[3] = float("nan")
    case.targets[3] = 1
    result = gated(path, case, skip_below=2**-12)
    assert result.loss.isnan()
    assert gradients(result.loss, case)[0][3].isnan().all()


@pytest.mark.parametrize("path", TILED_PATHS)
def test_a_batch_in_which_every_token_is_settled_is_kept(path: str) -> None:
    weight = torch.eye(8, device=DEVICE)
    targets = torch.arange(8, device=DEVICE)
    hidden = (300 * weight).requires_grad_()
    result = linear_gated_loss(hidden, weight, targets, path=path, skip_below=0.5)  # type: ignore[arg-type]
    assert result.skipped is not None
    assert not result.skipped.any()


@pytest.mark.parametrize("skip_below", [-0.1, 1.0, float("nan")])
def test_a_share_outside_its_range_is_refused(skip_below: float) -> None:
    with pytest.raises(ValueError, match=r"skip_below is .*\[0, 1\)"):
        gated("chunked", random_case(2, 3), skip_below=skip_below)


def test_the_reference_refuses_what_it_would_ignore() -> None:
    with pytest.raises(ValueError, match="skip_below would be ignored"):
        gated("reference", random_case(2, 3), skip_below=0.1)
