"""The public losses are called as their packages want it; those that compute on a CPU compute what they are named for.

Each test runs where its package is: `make test` runs this file with the packages of `make benchmark`.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch

from deft_plugin.benchmark.contestant import Machine, Needs
from deft_plugin.benchmark.job import Job, make_inputs
from deft_plugin.benchmark.measure import gradient_error
from deft_plugin.benchmark.public_losses import PUBLIC_LOSSES

LIGER = "liger_kernel.ops"
# What a contestant calls: a function, or an autograd function through `apply`.
CALLED = {
    "Liger FLCE, CuTe CE": ("liger_kernel.functional", "fused_linear_cross_entropy"),
    "Liger FLCE, CuTe SM90": (
        f"{LIGER}.cutedsl.ops.fused_linear_cross_entropy_sm90",
        "LigerFusedLinearCrossEntropySM90Function",
    ),
    "Liger FLCE, CuTe SM100": (
        f"{LIGER}.cutedsl.ops.fused_linear_cross_entropy",
        "LigerFusedLinearCrossEntropyFunction",
    ),
    "cut-cross-entropy": ("cut_cross_entropy", "linear_cross_entropy"),
    "cut-cross-entropy, unfiltered": ("cut_cross_entropy", "linear_cross_entropy"),
    "QuACK chunked": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
    "QuACK scaled exp": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
}
# By Triton's interpreter, PyTorch, or torch.compile.
ON_A_CPU = (
    "torch cross_entropy",
    "torch linear_cross_entropy",
    "TRL fused LM head",
    "Liger FLCE, Triton",
    "Liger FLCE, token scaling",
    "Liger scaled CE, CuTe SM90",
    "cut-cross-entropy, compiled",
)


def need(name: str, *but: str) -> None:
    """Skip where a package of a contestant is missing."""
    for module in set(PUBLIC_LOSSES[name].needs.modules) - set(but):
        pytest.importorskip(module)


def job(**changes: Any) -> Job:
    sizes = {"tokens": 128, "vocab": 256, "hidden": 64, "frozen": False, "dtype": "float32"}
    return Job(**{**sizes, "inputs": "trained", "device": "cpu", "repetitions": 1, **changes})


@pytest.mark.parametrize("name", CALLED)
def test_the_call_has_the_packages_signature(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(name)
    module_name, attribute = CALLED[name]
    module = pytest.importorskip(module_name)
    function = getattr(module, attribute)
    calls: list[inspect.BoundArguments] = []
    if inspect.isclass(function):
        parameters = list(inspect.signature(function.forward).parameters.values())[1:]  # ctx
        signature = inspect.Signature(parameters)
    else:
        signature = inspect.signature(function)

    def recorder(*args: Any, **kwargs: Any) -> Any:
        calls.append(signature.bind(*args, **kwargs))
        return (args[0].sum(), None)

    if inspect.isclass(function):
        monkeypatch.setattr(function, "apply", recorder)
    else:
        monkeypatch.setattr(module, attribute, recorder)
    hidden, weight, targets = make_inputs(job(), 128, 0)
    PUBLIC_LOSSES[name].build()(hidden, weight, targets)
    bound = calls[0].arguments
    tensors = [value for value in bound.values() if isinstance(value, torch.Tensor)]
    assert all(a is b for a, b in zip(tensors, (hidden, weight, targets), strict=True))
    # In the places of the hidden states, the weight and the targets, whatever they are called.
    assert list(bound)[:3] == list(signature.parameters)[:3]
    defaults = {
        key: parameter.default
        for key, parameter in signature.parameters.items()
        if key in ("ignore_index", "reduction")
    }
    assert {**defaults, **bound}.items() >= {"ignore_index": -100, "reduction": "mean"}.items()


def test_quacks_two_paths_are_told_apart() -> None:
    need("QuACK chunked")
    module = importlib.import_module("quack.linear_cross_entropy")
    assert inspect.signature(module.chunked_linear_cross_entropy).parameters["use_scaled_exp"]
    # What it is eligible for, as its requirements say; on a CPU it never is.
    assert not module.scaled_exp_lce_supported(torch.empty(8, 8), torch.empty(128, 8), 128, "mean")
    assert [module._pick_tile_n1(v) is not None for v in (128256, 151936, 128257)] == [1, 1, 0]


def test_cut_cross_entropy_filters_unless_told_otherwise() -> None:
    need("cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy
    from cut_cross_entropy.utils import _handle_eps

    default = inspect.signature(linear_cross_entropy).parameters["filter_eps"].default
    assert _handle_eps(default, torch.bfloat16) == torch.finfo(torch.bfloat16).eps / 32 == 2**-12
    assert _handle_eps(None, torch.bfloat16) is None


def test_liger_keeps_what_its_needs_say() -> None:
    need("Liger FLCE, CuTe SM90")
    from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90 as hopper

    needs = PUBLIC_LOSSES["Liger FLCE, CuTe SM90"].needs
    assert (needs.tokens_multiple, needs.vocab_multiple) == (hopper.TILE_M, hopper.TILE_N)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [0.0, 0.5])
@pytest.mark.parametrize("name", ON_A_CPU)
def test_gradients_are_those_of_the_objective(name: str, masked: float) -> None:
    need(name, "cutlass")
    if name == "Liger scaled CE, CuTe SM90":
        pytest.importorskip("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    contestant = PUBLIC_LOSSES[name]
    loss = contestant.build()
    for frozen in (False, True):
        assert gradient_error(loss, contestant.objective, job(frozen=frozen, masked=masked)) < 1e-5


HOPPER = Machine("cuda", (9, 0))
GPU_JOB = job(tokens=8192, vocab=128256, hidden=4096, dtype="bfloat16", device="cuda")


@pytest.mark.parametrize(
    ("machine", "needs", "changes", "reason"),
    [
        (HOPPER, Needs(), {}, None),
        (HOPPER, Needs(("no_such_module",)), {}, "no_such_module is not installed"),
        (Machine("cpu"), Needs(gpu=True), {}, "it needs a GPU"),
        (Machine("cpu"), Needs(capability=(9, 0)), {}, "it needs a GPU"),
        (Machine("cuda"), Needs(gpu=True), {}, None),
        (Machine("cuda"), Needs(capability=(9, 0)), {}, "NVIDIA GPU of compute capability 9.0"),
        (Machine("cuda", (10, 0)), Needs(capability=(9, 0)), {}, "9.0; this one's is 10.0"),
        (Machine("cuda", (10, 0)), Needs(least_capability=(9, 0)), {}, None),
        (Machine("cuda", (8, 9)), Needs(least_capability=(9, 0)), {}, "9.0 or higher; this one's"),
        (HOPPER, Needs(dtypes=("bfloat16",)), {"dtype": "float32"}, "in bfloat16, not in float32"),
        (HOPPER, Needs(vocab_multiple=256), {"vocab": 151936}, "multiple of 256; 151,936 is not"),
        (HOPPER, Needs(tokens_multiple=128), {"tokens": 100}, "tokens that is a multiple of 128"),
        (HOPPER, Needs(hidden_multiple=8), {"hidden": 12}, "hidden size that is a multiple of 8"),
    ],
)
def test_what_is_missing_is_named(
    machine: Machine, needs: Needs, changes: dict[str, Any], reason: str | None
) -> None:
    found = needs.unmet(machine, Job(**{**vars(GPU_JOB), **changes}))
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")


@pytest.mark.parametrize("installed", [True, False])
def test_on_a_cpu_every_other_loss_says_that_it_needs_a_gpu(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module if installed else None)
    unmet = {
        name: contestant.needs.unmet(Machine("cpu"), job())
        for name, contestant in PUBLIC_LOSSES.items()
    }
    runs = {name for name, reason in unmet.items() if reason is None}
    own = {"torch cross_entropy", "torch linear_cross_entropy"}
    assert runs == ({name for name in ON_A_CPU if "Liger" not in name} if installed else own)
    packages = {"trl is not installed", "cut-cross-entropy is not installed"}
    reasons = {reason for reason in unmet.values() if reason}
    assert reasons == ({"it needs a GPU"} if installed else {"it needs a GPU", *packages})


@pytest.mark.parametrize("vocab", [128256, 128257])
def test_a_vocabulary_of_odd_size_leaves_out_those_that_cannot(
    vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module)
    unmet = {
        name: contestant.needs.unmet(HOPPER, Job(**{**vars(GPU_JOB), "vocab": vocab}))
        for name, contestant in PUBLIC_LOSSES.items()
    }
    refused = {name for name, reason in unmet.items() if reason and "vocabulary" in reason}
    odd = {"Liger FLCE, CuTe CE", "Liger FLCE, CuTe SM90", "QuACK chunked", "QuACK scaled exp"}
    assert refused == (odd if vocab % 2 else set())
    assert "compute capability 10.0" in (unmet["Liger FLCE, CuTe SM100"] or "")
