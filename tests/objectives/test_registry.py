"""Names lead to objectives: the built-in ones, and a user's own from one decorated function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import deft_plugin
from deft_plugin import Objective, TokenStatistics, WeightedObjective, build_objective
from deft_plugin.objectives import MissingStatisticError

from .tokens import token_statistics

pytestmark = pytest.mark.usefixtures("own_objectives")


def _focal(log_p: Tensor, statistics: TokenStatistics, *, gamma: float = 2.0) -> Tensor:
    return -((1 - log_p.exp()) ** gamma) * log_p


def test_all_of_the_family_is_registered() -> None:
    family = {"nll", "p", "alpha", "dft", "eaft", "cayley", "cayley_trans", "deft"}
    assert family <= set(deft_plugin.objective_names())


def test_an_unknown_name_is_answered_with_the_closest_and_all_valid_ones() -> None:
    with pytest.raises(
        ValueError, match=r"Unknown objective 'defft'. Did you mean 'deft'\?"
    ) as error:
        build_objective("defft")
    assert all(name in str(error.value) for name in deft_plugin.objective_names())


@pytest.mark.parametrize("name", ["DEFT", "Deft", "dfet"])
def test_a_name_in_another_case_or_order_is_answered_with_the_right_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown objective {name!r}. Did you mean 'deft'"):
        build_objective(name)


@pytest.mark.parametrize(
    ("name", "parameter", "setting"),
    [
        ("deft", "tile_row", "tile_rows"),
        ("deft", "Path", "path"),
        ("alpha", "skipbelow", "skip_below"),
        ("deft", "histogram", "histograms"),
    ],
)
def test_a_misspelt_setting_among_the_parameters_is_recognised(
    name: str, parameter: str, setting: str
) -> None:
    with pytest.raises(ValueError, match=rf"parameter {parameter!r}. Did you mean {setting!r}\?"):
        build_objective(name, {parameter: 1})


@pytest.mark.parametrize("parameters", ["x", [], [("a", 1)], 0])
def test_parameters_that_are_no_mapping_are_refused(parameters: Any) -> None:
    with pytest.raises(ValueError, match=r"parameters=.* must be a mapping .* or None") as error:
        build_objective("alpha", parameters)
    assert repr(parameters) in str(error.value)


@pytest.mark.parametrize("spec", [None, 3, ["deft"]])
def test_what_is_no_name_is_refused(spec: Any) -> None:
    with pytest.raises(ValueError, match="Unknown objective"):
        build_objective(spec)


def test_a_built_objective_is_taken_as_it_is() -> None:
    built = build_objective("alpha", {"a": 0.1})
    assert build_objective(built) is built


def test_parameters_beside_a_built_objective_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"built already; parameters \{'a': 0.2\} would be ignored"
    ):
        build_objective(build_objective("alpha"), {"a": 0.2})


def test_a_decorated_function_is_an_objective_with_its_gate_by_autograd() -> None:
    assert deft_plugin.objective("focal", couples_tokens=False)(_focal) is _focal
    statistics = token_statistics([-1e-9, -0.3, -4.0])
    objective = build_objective("focal", {"gamma": 1.5})

    log_p, p = statistics.log_p, statistics.p
    torch.testing.assert_close(
        objective.loss(log_p, statistics), -((1 - p) ** 1.5) * log_p, rtol=1e-15, atol=0
    )
    gate = (1 - p) ** 1.5 - 1.5 * (1 - p) ** 0.5 * p * log_p
    torch.testing.assert_close(objective.gate(statistics), gate, rtol=1e-12, atol=0)
    assert not objective.couples_tokens


def test_a_function_is_taken_to_couple_tokens_unless_it_says_not() -> None:
    deft_plugin.objective("focal")(_focal)
    assert build_objective("focal").couples_tokens


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_gate_of_a_function_does_not_depend_on_grad_mode(mode: Callable[[], Any]) -> None:
    @deft_plugin.objective("sharp", needs=("collision",))
    def sharp(log_p: Tensor, statistics: TokenStatistics) -> Tensor:
        assert statistics.collision is not None
        return -statistics.collision * log_p

    with mode():
        statistics = token_statistics([-0.2, -3.0], collision=[0.25, 0.75])
        gate = build_objective("sharp").gate(statistics)
    assert gate.tolist() == [0.25, 0.75]


def test_a_loss_without_gradient_is_refused() -> None:
    @deft_plugin.objective("detached")
    def detached(log_p: Tensor, statistics: TokenStatistics) -> Tensor:
        return -statistics.log_p

    with pytest.raises(ValueError, match="'detached' returned a loss that does not depend on"):
        build_objective("detached").gate(token_statistics([-1.0]))


def test_a_loss_of_another_shape_is_refused() -> None:
    @deft_plugin.objective("summed")
    def summed(log_p: Tensor, statistics: TokenStatistics) -> Tensor:
        return -log_p.sum()

    with pytest.raises(
        ValueError, match=r"'summed' must return one loss per token, of shape \(2,\)"
    ):
        build_objective("summed").gate(token_statistics([-1.0, -2.0]))


def test_parameters_are_typed_by_annotation_or_default() -> None:
    @deft_plugin.objective("typed")
    def typed(
        log_p: Tensor,
        statistics: TokenStatistics,
        *,
        strength: float = 1.0,
        power=2,  # type: ignore[no-untyped-def]
        kind: Literal["soft", "hard"] = "soft",
        cut: float | None = None,
        inverted: bool = False,
    ) -> Tensor:
        sign = -1 if kind == "soft" and cut is None and not inverted else 1
        return sign * strength * log_p**power

    objective = build_objective("typed", {"strength": 3, "power": 1})
    assert objective.gate(token_statistics([-2.0])).tolist() == [3.0]
    for field, value, valid in [
        ("strength", "strong", "a number"),
        ("power", 1.5, "an integer"),
        ("kind", "weak", "one of 'soft', 'hard'"),
        ("cut", "none", "a number or None"),
        ("inverted", 1, "true or false"),
    ]:
        with pytest.raises(
            ValueError, match=f"'typed': parameter '{field}' is {value!r}; .*{valid}"
        ):
            build_objective("typed", {field: value})
    with pytest.raises(ValueError, match=r"no parameter 'strenght'. Did you mean 'strength'\?"):
        build_objective("typed", {"strenght": 1.0})


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'deft' is taken by deft_plugin.objectives.family.DEFT"):
        deft_plugin.objective("deft")(_focal)


def test_defining_the_same_function_again_replaces_it() -> None:
    """As running a notebook's cell twice does."""

    def define(factor: float) -> None:
        @deft_plugin.objective("scaled")
        def scaled(log_p: Tensor, statistics: TokenStatistics) -> Tensor:
            return -factor * log_p

    define(1.0)
    define(2.0)
    assert build_objective("scaled").gate(token_statistics([-1.0])).tolist() == [2.0]


@pytest.mark.parametrize("name", ["my loss", "", "1st", None])
def test_a_name_that_is_no_identifier_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="must be letters, digits and underscores"):
        deft_plugin.objective(name)(_focal)


def test_an_unknown_need_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"\['colision'\].*collision, entropy"):
        deft_plugin.objective("focal", needs=("colision",))


def test_top_k_entropy_is_refused_where_no_k_can_be_given() -> None:
    with pytest.raises(ValueError, match="also needs a k: subclass"):
        deft_plugin.objective("focal", needs=("top_k_entropy",))


def _without_statistics(log_p: Tensor) -> Tensor:
    return -log_p


def _positional_parameter(log_p: Tensor, statistics: TokenStatistics, gamma: float = 1) -> Tensor:
    return -gamma * log_p


def _without_default(log_p: Tensor, statistics: TokenStatistics, *, gamma: float) -> Tensor:
    return -gamma * log_p


def _any_parameters(log_p: Tensor, statistics: TokenStatistics, **parameters: float) -> Tensor:
    return -log_p


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_without_statistics, r"must take \(log_p, statistics\)"),
        (_positional_parameter, r"must take \(log_p, statistics\) and its parameters after a bare"),
        (_without_default, "'gamma' of _without_default must be keyword-only and have a default"),
        (_any_parameters, "'parameters' of _any_parameters must be keyword-only"),
    ],
)
def test_a_signature_that_does_not_fit_is_refused(
    function: Callable[..., Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        deft_plugin.objective("odd")(function)


def test_a_class_can_be_registered_and_its_parameters_are_validated() -> None:
    @deft_plugin.register_objective("confident")
    @dataclass(frozen=True)
    class Confident(WeightedObjective):
        floor: float = 0.0
        needs = ("collision",)

        def validate(self) -> None:
            self.require("floor", 0 <= self.floor < 1, "in [0, 1)")

        def weight(self, statistics: TokenStatistics) -> Tensor:
            assert statistics.collision is not None
            return statistics.collision.clamp(min=self.floor)

    statistics = token_statistics([-1.0, -1.0], collision=[0.1, 0.9])
    objective = build_objective("confident", {"floor": 0.5})
    assert objective.gate(statistics).tolist() == [0.5, 0.9]
    with pytest.raises(ValueError, match=r"'confident': parameter 'floor' is 1.0; .* in \[0, 1\)"):
        build_objective("confident", {"floor": 1})


def test_only_objectives_can_be_registered() -> None:
    with pytest.raises(ValueError, match="must be a subclass of"):
        deft_plugin.register_objective("number")(int)  # type: ignore[type-var]


def test_a_class_without_loss_says_what_is_missing() -> None:
    class Empty(Objective):
        pass

    with pytest.raises(NotImplementedError, match="Empty does not define `loss`"):
        Empty().gate(token_statistics([-1.0]))


@pytest.mark.parametrize("statistic", ["collision", "entropy", "top_k_entropy"])
def test_a_statistic_that_was_not_asked_for_cannot_be_read(statistic: str) -> None:
    with pytest.raises(
        MissingStatisticError, match=rf"statistics.{statistic}.*needs=\(\"{statistic}\""
    ):
        getattr(token_statistics([-1.0]), statistic)


def test_statistics_that_were_asked_for_can_be_read() -> None:
    statistics = token_statistics([math.log(0.25)], collision=[0.5], entropy=[0.7])
    assert (statistics.p.item(), statistics.collision.item()) == (pytest.approx(0.25), 0.5)
    assert statistics.entropy.item() == 0.7
