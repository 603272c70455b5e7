"""A wrong parameter is refused with its field, its value and what would be valid."""

from __future__ import annotations

import math
from typing import Any

import pytest

from deft_plugin import build_objective


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("alpha", {"a": -0.1}, ["'alpha'", "'a'", "-0.1", "finite number >= 0"]),
        ("alpha", {"a": math.nan}, ["'a'", "nan", "finite number >= 0"]),
        ("alpha", {"a": math.inf}, ["'a'", "inf", "finite number >= 0"]),
        ("alpha", {"a": None}, ["'a'", "None", "a number"]),
        ("alpha", {"a": True}, ["'a'", "True", "a number"]),
        ("alpha", {"a": "1e-3"}, ["'a'", "'1e-3'", "a number", "0.001"]),
        ("alpha", {"a": [0.5]}, ["'a'", "[0.5]", "a number"]),
        ("eaft", {"k": 1}, ["'k'", "1", "integer >= 2"]),
        ("eaft", {"k": 20.5}, ["'k'", "20.5", "an integer"]),
        ("eaft", {"k": math.inf}, ["'k'", "inf", "an integer"]),
        ("eaft", {"k": math.nan}, ["'k'", "nan", "an integer"]),
        ("eaft", {"normalizer": 0}, ["'normalizer'", "0.0", "> 0"]),
        ("eaft", {"normalizer": math.inf}, ["'normalizer'", "inf", "> 0"]),
        ("eaft", {"exponent": -1}, ["'exponent'", "-1", ">= 0"]),
        ("eaft", {"exponent": math.nan}, ["'exponent'", "nan", ">= 0"]),
        ("eaft", {"entropy": "topk"}, ["'entropy'", "'topk'", "'top_k'", "'full'"]),
        ("cayley_trans", {"floor_coefficient": 1.5}, ["'floor_coefficient'", "1.5", "[0, 1]"]),
        ("cayley_trans", {"floor_coefficient": math.nan}, ["'floor_coefficient'", "nan", "[0, 1]"]),
        ("cayley_trans", {"minimum": -0.5}, ["'minimum'", "-0.5", "[0, 1]"]),
        ("cayley_trans", {"scope": "batch"}, ["'scope'", "'batch'", "'micro_batch'", "'fixed'"]),
        ("cayley_trans", {"scope": "fixed"}, ["'mean_probability'", "None", "[0, 1]", "'fixed'"]),
        (
            "cayley_trans",
            {"scope": "fixed", "mean_probability": 1.1},
            ["'mean_probability'", "1.1", "[0, 1]"],
        ),
        (
            "cayley_trans",
            {"mean_probability": 0.5},
            ["'mean_probability'", "0.5", "'fixed'", "unless you set scope"],
        ),
        (
            "cayley_trans",
            {"scope": "global", "mean_probability": 0.5},
            ["'mean_probability'", "0.5", "'ema'", "unless you set scope"],
        ),
        (
            "cayley_trans",
            {"scope": "ema", "mean_probability": -1},
            ["'mean_probability'", "-1", "[0, 1]", "'ema'"],
        ),
        ("cayley_trans", {"scope": "ema", "decay": 1}, ["'decay'", "1", "[0, 1)"]),
        ("cayley_trans", {"decay": 0.5}, ["'decay'", "0.5", "'ema'", "unless you set scope"]),
        ("cayley_trans", {"mean_probability": "half"}, ["'mean_probability'", "'half'", "None"]),
    ],
    ids=str,
)
def test_a_value_out_of_range_or_of_another_type_is_refused(
    name: str, parameters: dict[str, Any], expected: list[str]
) -> None:
    with pytest.raises(ValueError, match="Objective") as error:
        build_objective(name, parameters)
    assert [part for part in expected if part not in str(error.value)] == []


@pytest.mark.parametrize("name", ["nll", "p", "dft", "cayley", "deft"])
def test_an_objective_without_parameters_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' has no parameter 'a'. It takes no parameters"):
        build_objective(name, {"a": 0.5})


def test_a_misspelt_parameter_is_named_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"'flor_coefficient'.*mean 'floor_coefficient'.*minimum"):
        build_objective("cayley_trans", {"flor_coefficient": 0.5})


@pytest.mark.parametrize(
    ("name", "given", "field", "value"),
    [
        ("alpha", {"a": 1}, "a", 1.0),
        ("alpha", {}, "a", 0.5),
        ("eaft", {"k": 20.0}, "k", 20),
        ("eaft", {"k": 2}, "k", 2),
        ("eaft", {"exponent": 0}, "exponent", 0.0),
        ("eaft", {"entropy": "full"}, "entropy", "full"),
        ("cayley_trans", {"floor_coefficient": 0}, "floor_coefficient", 0.0),
        ("cayley_trans", {"scope": "fixed", "mean_probability": 1}, "mean_probability", 1.0),
        ("cayley_trans", {"mean_probability": None}, "mean_probability", None),
    ],
)
def test_a_valid_value_is_kept_in_the_declared_type(
    name: str, given: dict[str, Any], field: str, value: Any
) -> None:
    kept = getattr(build_objective(name, given), field)
    assert kept == value
    assert type(kept) is type(value)


@pytest.mark.parametrize(
    ("parameters", "needs", "top_k"),
    [
        ({}, ("top_k_entropy",), 20),
        ({"k": 7}, ("top_k_entropy",), 7),
        ({"entropy": "full"}, ("entropy",), None),
    ],
)
def test_eaft_asks_for_the_entropy_it_uses(
    parameters: dict[str, Any], needs: tuple[str, ...], top_k: int | None
) -> None:
    objective = build_objective("eaft", parameters)
    assert (objective.needs, objective.top_k) == (needs, top_k)
