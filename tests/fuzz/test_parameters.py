"""Whatever is given for an objective and its parameters is a valid objective or a `ValueError` that says why."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deft_plugin import Objective, build_objective, linear_gated_loss, objective_names
from deft_plugin.training import split_parameters

from .anything import parameters, values


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.sampled_from(objective_names()), values), parameters)
@example("deft", {"a": math.nan})
def test_an_objective_is_valid_or_refused(name: Any, given_parameters: dict[str, Any]) -> None:
    try:
        core, _, rest = split_parameters(given_parameters)
        objective = build_objective(name, rest)
    except ValueError as error:
        assert str(error)
        return
    assert isinstance(objective, Objective)
    for field in dataclasses.fields(objective):
        value = getattr(objective, field.name)
        assert not isinstance(value, float) or math.isfinite(value), field.name
        # What is kept is what was given, in the declared type; nothing is silently something else.
        if field.name in rest and rest[field.name] is not None:
            assert value == rest[field.name], field.name
    if objective.step_scope is None and core.path not in ("triton", "quack"):
        result = linear_gated_loss(
            torch.randn(3, 4, requires_grad=True),
            torch.randn(5, 4),
            torch.tensor([1, -100, 4]),
            objective,
            **dataclasses.asdict(core),
        )
        result.loss.backward()
        assert result.loss.isfinite()


@settings(max_examples=150, deadline=None)
@given(st.one_of(parameters, values), st.booleans())
def test_loss_kwargs_of_the_trainer_are_valid_or_refused(given_value: Any, as_json: bool) -> None:
    trl = pytest.importorskip("deft_plugin.trl")
    value = json.dumps(given_value, default=str) if as_json else given_value
    try:
        args = trl.SFTConfig(
            loss_type="cayley_trans",
            loss_kwargs=value,
            output_dir="unused",
            use_cpu=True,
            bf16=False,
        )
    except ValueError as error:
        named = ("loss_kwargs", "cayley_trans", "path", "tile_rows", "skip_below", "histograms")
        assert any(name in str(error) for name in named)
        return
    assert args.loss_type == "cayley_trans"


shapes = st.lists(st.integers(0, 3), max_size=3)
dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool]
)


@settings(max_examples=300, deadline=None)
@given(shapes, shapes, shapes, dtypes, dtypes, dtypes, st.integers(-101, 4))
def test_tensors_of_any_shape_and_dtype_have_a_loss_or_are_refused(
    hidden_shape: list[int],
    weight_shape: list[int],
    targets_shape: list[int],
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    targets_dtype: torch.dtype,
    target: int,
) -> None:
    hidden = torch.ones(hidden_shape, dtype=hidden_dtype)
    weight = torch.ones(weight_shape, dtype=weight_dtype)
    targets = torch.full(targets_shape, target).to(targets_dtype)
    try:
        loss = linear_gated_loss(hidden, weight, targets).loss
    except ValueError as error:
        assert any(name in str(error) for name in ("hidden", "weight", "targets"))
        return
    assert loss.shape == ()
    assert loss.isfinite()
