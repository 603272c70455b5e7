"""Normalisation, and the refusal of arguments that do not fit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from deft_plugin import gated_loss, linear_gated_loss
from deft_plugin.ops import PATHS as NAMES

from .cases import LINEAR_PATHS, PATHS, gated, gradients, random_case, relative_error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("options", "divisor"),
    [
        ({}, "valid"),
        ({"reduction": "sum"}, 1),
        ({"num_items_in_batch": 37}, 37),
        ({"num_items_in_batch": torch.tensor(37)}, 37),
        ({"num_items_in_batch": torch.tensor(37.0)}, 37),
        # A step without any valid token on any rank.
        ({"num_items_in_batch": 0}, 1),
        ({"num_items_in_batch": torch.tensor(0)}, 1),
    ],
    ids=str,
)
def test_the_loss_is_the_sum_over_its_divisor(
    path: str, options: dict[str, Any], divisor: int | str
) -> None:
    case = random_case(12, 20, masked_share=0.3)
    result = gated(path, case, "deft", **options)
    total = result.token_loss.sum()
    expected = total / (result.mask.sum() if divisor == "valid" else divisor)
    assert relative_error(result.loss, expected) < 1e-14
    (by_sum,) = torch.autograd.grad(expected, [case.hidden], retain_graph=True)
    assert relative_error(gradients(result.loss, case)[0], by_sum) < 1e-14


@pytest.mark.parametrize("path", PATHS)
def test_any_target_value_can_be_the_ignored_one(path: str) -> None:
    case = random_case(12, 3)
    assert (case.targets == 2).any()
    result = gated(path, dataclasses.replace(case, ignore_index=2))
    expected = gated(path, case)
    assert torch.equal(result.mask, case.targets != 2)
    assert torch.equal(result.token_loss, torch.where(result.mask, expected.token_loss, 0))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, r"reduction='none' is not valid. Choices: 'mean', 'sum'"),
        ({"reduction": "sum", "num_items_in_batch": 3}, "num_items_in_batch would be ignored"),
        ({"objective": "defft"}, r"Unknown objective 'defft'. Did you mean 'deft'"),
        ({"parameters": {"k": 3}}, "'deft' has no parameter 'k'"),
        (
            {"objective": "alpha", "parameters": {"a": -1}},
            "'a' is -1.0; it must be a finite number",
        ),
    ],
)
def test_an_option_that_does_not_fit_is_refused(
    path: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gated(path, random_case(3, 4), **options)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_targets_that_are_no_integers_are_refused(path: str, dtype: torch.dtype) -> None:
    case = random_case(3, 4)
    with pytest.raises(ValueError, match=f"targets must be integers; their dtype is {dtype}"):
        gated(path, dataclasses.replace(case, targets=case.targets.to(dtype)))


@pytest.mark.parametrize("path", PATHS)
def test_targets_of_another_shape_are_refused(path: str) -> None:
    case = random_case(3, 4)
    with pytest.raises(ValueError, match=r"\(4,\)"):
        gated(path, dataclasses.replace(case, targets=torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"softcap": 0}, r"softcap is 0.0; it must be a number > 0, or None"),
        ({"softcap": -3.0}, "softcap is -3.0"),
        ({"softcap": math.nan}, "softcap is nan"),
        ({"logit_scale": math.inf}, "logit_scale is inf; it must be a finite number"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \(4,\); its shape is \(5,\)"),
        ({"weight": torch.zeros(4, 9)}, r"\(3, 8\) and \(4, 9\)"),
        ({"weight": torch.zeros(32)}, r"weight \(V, H\); their shapes are \(3, 8\) and \(32,\)"),
        (
            {"weight": torch.zeros(4, 8, dtype=torch.uint8)},
            "torch.uint8. A quantised lm_head is not supported",
        ),
        ({"low_rank_weight": torch.zeros(5, 2)}, r"low_rank_weight must be .*4 .* is \(5, 2\)"),
        ({"low_rank_weight": torch.zeros(4, 0)}, r"r at least 1; its shape is \(4, 0\)"),
        ({"low_rank_weight": torch.zeros(8)}, r"low_rank_weight must be \(V, r\).*\(8,\)"),
        ({"low_rank_weight": torch.zeros(4, 3)}, r"low_rank_hidden .* \(3, 3\); .*\(3, 2\)"),
        ({"low_rank_hidden": torch.zeros(6)}, r"low_rank_hidden .* \(3, 2\); .*\(6,\)"),
        (
            {"low_rank_hidden": torch.zeros(3, 2, dtype=torch.int64)},
            "low_rank_hidden must be floating; its dtype is torch.int64",
        ),
        (
            {"low_rank_weight": torch.zeros(4, 2, dtype=torch.int8)},
            "low_rank_weight must be floating; its dtype is torch.int8",
        ),
        (
            {"low_rank_hidden": torch.zeros(3, 2, device="meta")},
            "low_rank_hidden must be on weight's device, .*; it is on meta",
        ),
        (
            {"low_rank_weight": torch.zeros(4, 2, device="meta")},
            "low_rank_weight must be on weight's device, .*; it is on meta",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    path: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gated(path, dataclasses.replace(random_case(3, 4, rank=2), **changed))


@pytest.mark.parametrize("low_rank", [torch.zeros(4, 2), (torch.zeros(3, 2),), (1.0, 2.0)], ids=str)
def test_a_low_rank_that_is_no_pair_is_refused(low_rank: Any) -> None:
    case = random_case(3, 4)
    with pytest.raises(ValueError, match=r"low_rank must be a pair of tensors .* a (tuple|Tensor)"):
        linear_gated_loss(case.hidden, case.weight, case.targets, low_rank=low_rank)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "fused"}, "path='fused' is not valid. Choices: " + ", ".join(map(repr, NAMES))),
        ({"tile_rows": 0}, "tile_rows is 0; it must be an integer >= 1, or None"),
    ],
)
def test_an_unknown_path_or_tile_is_refused(options: dict[str, Any], message: str) -> None:
    case = random_case(3, 4)
    with pytest.raises(ValueError, match=message):
        linear_gated_loss(case.hidden, case.weight, case.targets, **options)


def test_given_logits_must_be_floating() -> None:
    with pytest.raises(ValueError, match=r"logits must be floating .*torch.int64 \(3, 4\)"):
        gated_loss(torch.ones(3, 4, dtype=torch.int64), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("kind", ["column", "every other", "expanded"])
def test_targets_and_bias_may_be_views_of_any_stride(path: str, kind: str) -> None:
    case = random_case(10, 13, bias=True)
    assert case.bias is not None
    wide = torch.stack((case.targets, case.targets.flip(0)), 1)
    views = {
        "column": wide[:, 0],
        "every other": wide.reshape(-1)[::2],
        "expanded": case.targets[3].expand(10),
    }
    bias = torch.stack((case.bias.detach(), case.bias.detach() + 1), 1)[:, 0]
    assert not bias.is_contiguous()
    strided = dataclasses.replace(case, targets=views[kind], bias=bias)
    plain = dataclasses.replace(case, targets=views[kind].clone(), bias=bias.clone())
    assert relative_error(gated(path, strided).token_loss, gated(path, plain).token_loss) < 1e-12


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("ignore_index", None, "ignore_index is None; it must be an integer"),
        ("num_items_in_batch", -5, "num_items_in_batch is -5; it must be a number >= 0"),
        ("num_items_in_batch", "7", "num_items_in_batch is '7'; it must be a number >= 0"),
        ("num_items_in_batch", torch.ones(2), r"must be one number.*\(2,\)"),
    ],
    ids=str,
)
def test_a_value_that_no_call_could_have_is_refused(
    argument: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gated("chunked", random_case(2, 3), **{argument: value})


@pytest.mark.parametrize(("vocab_size", "hidden_size"), [(0, 4), (4, 0)])
def test_an_empty_weight_is_refused(vocab_size: int, hidden_size: int) -> None:
    hidden, weight = torch.zeros(2, hidden_size), torch.zeros(vocab_size, hidden_size)
    with pytest.raises(ValueError, match="V and H must be at least 1"):
        linear_gated_loss(hidden, weight, torch.tensor([-100, -100]))


def test_targets_as_a_list_are_refused() -> None:
    with pytest.raises(ValueError, match=r"targets must .* a list"):
        linear_gated_loss(torch.zeros(2, 3), torch.zeros(4, 3), [0, 1])  # type: ignore[arg-type]


def test_a_count_of_shape_one_leaves_the_loss_a_scalar() -> None:
    loss = gated("chunked", random_case(2, 3), num_items_in_batch=torch.tensor([7])).loss
    assert loss.shape == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": 1.0}, "bias must be a tensor or None; it is a float"),
        (
            {"bias": torch.zeros(5, device="meta")},
            "bias must be on weight's device, cpu; it is on meta",
        ),
        ({"shard": 3}, "shard must be a VocabularyShard or None; it is 3"),
        ({"softcap": "x"}, "softcap is 'x'; it must be a number"),
        ({"softcap": 1e-40}, "softcap is 1e-40; .*The smallest is 1e-30"),
        ({"logit_scale": None}, "logit_scale is None; it must be a number"),
        (
            {"logit_scale": 1e-46},
            "logit_scale is 1e-46; it must be a finite number, 0 or at least 1e-30",
        ),
        (
            {"ignore_index": 2**64},
            "ignore_index is 18446744073709551616; it must be an integer of 64 bits",
        ),
        ({"targets": torch.zeros(3, dtype=torch.uint64)}, "their dtype is torch.uint64"),
    ],
    ids=str,
)
def test_what_is_no_argument_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.ones(3, 4),
        "weight": torch.ones(5, 4),
        "targets": torch.zeros(3, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        linear_gated_loss(**{**arguments, **change})


def test_numpys_numbers_are_numbers() -> None:
    import numpy

    case = random_case(6, 5, masked_share=0.3)
    result = gated(
        "chunked",
        case,
        skip_below=numpy.float32(0),
        tile_rows=numpy.int64(2),
        num_items_in_batch=numpy.int64(3),
    )
    assert torch.equal(result.loss, gated("chunked", case, num_items_in_batch=3, tile_rows=2).loss)
