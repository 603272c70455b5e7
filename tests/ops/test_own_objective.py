"""A user's own objective has the fused path: loss and gradients of autograd on full logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import deft_plugin
from deft_plugin import Objective, TokenStatistics, WeightedObjective, gated_loss
from deft_plugin.objectives import MissingStatisticError, family
from deft_plugin.objectives.registry import RESERVED_PARAMETERS
from deft_plugin.ops import CoreSettings
from deft_plugin.training import TrainingSettings

from .cases import (
    LINEAR_PATHS,
    PATHS,
    TILED_PATHS,
    gated,
    gradients,
    largest_error,
    random_case,
    relative_error,
)
from .formulas import shannon_entropy

TargetFormula = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _registered(own_objectives: None) -> None:
    @deft_plugin.objective("focal", couples_tokens=False)
    def focal(log_p: Tensor, statistics: TokenStatistics, *, gamma: float = 2.0) -> Tensor:
        return -((1 - log_p.exp()) ** gamma) * log_p

    # Its gate is negative: it pushes the target down.
    @deft_plugin.objective("unlikelihood", couples_tokens=False)
    def unlikelihood(log_p: Tensor, statistics: TokenStatistics) -> Tensor:
        return -torch.log1p(-log_p.exp())

    @deft_plugin.objective("informed", needs=("collision", "entropy"), couples_tokens=False)
    def informed(log_p: Tensor, statistics: TokenStatistics) -> Tensor:
        assert statistics.collision is not None
        assert statistics.entropy is not None
        return -(statistics.collision + statistics.entropy + statistics.p) * log_p

    @deft_plugin.objective("centred")
    def centred(log_p: Tensor, statistics: TokenStatistics) -> Tensor:
        return -(statistics.p / statistics.p.mean()) * log_p

    @deft_plugin.register_objective("collision_weighted")
    @dataclass(frozen=True)
    class CollisionWeighted(WeightedObjective):
        needs = ("collision",)

        def weight(self, statistics: TokenStatistics) -> Tensor:
            assert statistics.collision is not None
            return statistics.collision

    @deft_plugin.register_objective("top_two")
    @dataclass(frozen=True)
    class TopTwo(Objective):
        needs = ("top_k_entropy",)
        top_k = 2

        def loss(self, log_p: Tensor, statistics: TokenStatistics) -> Tensor:
            assert statistics.top_k_entropy is not None
            return -(statistics.top_k_entropy**2) * log_p


# Loss of log p, differentiable, and of p (n, V), detached.
FORMULAS: dict[str, TargetFormula] = {
    "focal": lambda log_p, p: -((1 - log_p.exp()) ** 2) * log_p,
    "unlikelihood": lambda log_p, p: -(1 - log_p.exp()).log(),
    "informed": lambda log_p, p: (
        -((p**2).sum(1) + shannon_entropy(p) + log_p.detach().exp()) * log_p
    ),
    "centred": lambda log_p, p: -(log_p.detach().exp() / log_p.detach().exp().mean()) * log_p,
    "collision_weighted": lambda log_p, p: -(p**2).sum(1) * log_p,
    "top_two": lambda log_p, p: -(_top_two_entropy(p) ** 2) * log_p,
}


def _top_two_entropy(p: Tensor) -> Tensor:
    largest = p.sort(1, descending=True).values[:, :2]
    return shannon_entropy(largest / largest.sum(1, keepdim=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("trainable", [["hidden"], ["hidden", "weight", "bias"]])
def test_an_own_objective_equals_its_formula_on_full_logits(
    path: str, name: str, trainable: list[str]
) -> None:
    case = random_case(
        11, 30, bias=True, masked_share=0.2, logit_std=(0.1, 3.0), trainable=trainable
    )
    valid = case.targets != -100
    logits, targets = case.logits()[valid], case.targets[valid]
    log_p = logits.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    expected = FORMULAS[name](log_p, logits.detach().softmax(1))

    result = gated(path, case, name, tile_rows=3)
    assert relative_error(result.token_loss[valid], expected) < 1e-10
    upstream = torch.linspace(-1, 2, len(expected), dtype=torch.float64, device=log_p.device)
    for actual, wanted in [
        (result.loss, expected.mean()),
        (result.token_loss[valid] @ upstream, expected @ upstream),
    ]:
        assert (
            largest_error(
                gradients(actual, case, retain_graph=True),
                gradients(wanted, case, retain_graph=True),
            )
            < 1e-10
        )


@pytest.mark.parametrize("path", PATHS)
def test_parameters_reach_the_function(path: str) -> None:
    case = random_case(6, 12)
    nll = gated(path, case, "nll")
    result = gated(path, case, "focal", parameters={"gamma": 0.0})
    assert relative_error(result.token_loss, nll.token_loss) < 1e-14
    assert torch.equal(result.gate, torch.ones_like(result.gate))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", FORMULAS)
def test_its_gate_is_reported_in_an_evaluation(
    path: str, mode: Callable[[], Any], name: str
) -> None:
    case = random_case(6, 12, logit_std=(0.1, 3.0))
    training = gated(path, case, name)
    with mode():
        evaluation = gated(path, case, name)
    assert (evaluation.gate != 0).all()
    torch.testing.assert_close(evaluation.gate, training.gate, rtol=1e-14, atol=0)


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize(("name", "sign"), [("unlikelihood", 1), ("focal", -1)])
def test_a_negative_gate_or_upstream_gradient_is_not_skipped_as_a_small_one(
    path: str, name: str, sign: int
) -> None:
    case = random_case(16, 12, logit_std=(0.1, 3.0))
    weights = sign * torch.linspace(1, 2, 16, dtype=torch.float64, device=case.hidden.device)
    exact = gradients(gated(path, case, name).token_loss @ weights, case)
    result = gated(path, case, name, skip_below=2**-12)
    assert largest_error(gradients(result.token_loss @ weights, case), exact) < 2**-11


@pytest.mark.parametrize("path", PATHS)
def test_its_errors_come_through_every_path(path: str) -> None:
    case = random_case(3, 5)

    @deft_plugin.objective("forgetful")
    def forgetful(log_p: Tensor, statistics: TokenStatistics) -> Tensor:
        return -log_p * statistics.collision

    @deft_plugin.objective("averaging")
    def averaging(log_p: Tensor, statistics: TokenStatistics) -> Tensor:
        return -log_p.mean()

    with pytest.raises(MissingStatisticError, match=r"needs=\(\"collision\",\)"):
        gated(path, case, "forgetful")
    with pytest.raises(ValueError, match=r"'averaging' must return one loss per token"):
        gated(path, case, "averaging")


def test_an_instance_can_be_given_without_a_name() -> None:
    @dataclass(frozen=True)
    class Cubed(Objective):
        def loss(self, log_p: Tensor, statistics: TokenStatistics) -> Tensor:
            return (-log_p) ** 3

    logits = torch.randn(4, 7, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3])
    log_p = logits.log_softmax(1)[torch.arange(4), targets]
    assert relative_error(gated_loss(logits, targets, Cubed()).token_loss, -(log_p**3)) < 1e-12


@pytest.mark.parametrize("path", LINEAR_PATHS)
def test_a_subclass_with_a_loss_of_its_own_is_trained_by_that_loss(path: str) -> None:
    @deft_plugin.register_objective("twice_deft")
    @dataclass(frozen=True)
    class TwiceDEFT(family.DEFT):
        def loss(self, log_p: Tensor, statistics: TokenStatistics) -> Tensor:
            return 2 * super().loss(log_p, statistics)

    case = random_case(6, 20)
    twice, once = gated(path, case, "twice_deft"), gated(path, case, "deft")
    assert relative_error(twice.gate, 2 * once.gate) < 1e-12
    expected = [2 * gradient for gradient in gradients(once.loss, case)]
    assert largest_error(gradients(twice.loss, case), expected) < 1e-12


@pytest.mark.parametrize("path", PATHS)
def test_an_objective_that_changes_its_statistics_changes_nothing_else(path: str) -> None:
    @deft_plugin.objective("careless", needs=("entropy",), couples_tokens=False)
    def careless(log_p: Tensor, statistics: TokenStatistics) -> Tensor:
        assert statistics.entropy is not None
        statistics.entropy.mul_(0.5)
        return -log_p * statistics.entropy

    case = random_case(6, 20)
    result = gated(path, case, "careless", with_entropy=True)
    plain = gated(path, case, "deft", with_entropy=True)
    assert result.entropy is not None
    assert plain.entropy is not None
    assert relative_error(result.entropy, plain.entropy) < 1e-12
    assert relative_error(result.gate, 0.5 * plain.entropy) < 1e-12
    assert relative_error(result.token_loss, -0.5 * plain.entropy * plain.log_p) < 1e-12


@pytest.mark.parametrize("name", RESERVED_PARAMETERS)
def test_names_of_settings_cannot_be_parameters(name: str) -> None:
    shadow = dataclasses.make_dataclass(
        "Shadow", [(name, float, 0.0)], bases=(Objective,), frozen=True
    )
    with pytest.raises(ValueError, match=f"cannot have a parameter '{name}'"):
        deft_plugin.register_objective("shadow")(shadow)


def test_every_setting_is_reserved() -> None:
    settings = (*dataclasses.fields(CoreSettings), *dataclasses.fields(TrainingSettings))
    assert {field.name for field in settings} | {"module"} == {*RESERVED_PARAMETERS}
