"""The gated head under accelerate's wrappers and hooks, and under FSDP2 on two processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PreTrainedModel

from deft_plugin import GatedCausalLMOutput, add_gated_head

from ..distributed.ranks import run_ranks
from ..tiny import tiny_model
from .oracle import (
    Batch,
    assert_like_formula,
    assert_same_gradients,
    formula_loss,
    gradients,
    make_batch,
)


@pytest.fixture
def batch() -> Batch:
    return make_batch()


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_wraps_and_unwraps_around_the_head(
    batch: Batch, accelerator: Accelerator
) -> None:
    model = tiny_model("llama", initializer_range=0.08)
    head = add_gated_head(model)
    exact = model(**batch).loss

    prepared = accelerator.prepare(model)
    output = prepared(**batch)

    assert isinstance(output, GatedCausalLMOutput)
    torch.testing.assert_close(output.loss, exact, rtol=0.05, atol=0)
    with pytest.raises(RuntimeError, match="unwrap_model"):
        head.remove()

    # What the message advises.
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(**batch).loss, exact)
    head.remove()
    assert "logits" in unwrapped(**batch)


@pytest.mark.parametrize("head_first", [False, True])
def test_a_model_dispatched_by_device_map_equals_the_formula(
    head_first: bool, batch: Batch
) -> None:
    model = tiny_model("llama").double()
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)
    device_map = {"model": "cpu", "lm_head": "cpu"}

    if head_first:
        add_gated_head(model)
    model = dispatch_model(model, device_map, force_hooks=True)
    if not head_first:
        add_gated_head(model)

    assert_like_formula(model, loss, expected, batch)
    assert "logits" in model(input_ids=batch["input_ids"])


def test_an_offloaded_lm_head_is_refused(batch: Batch, tmp_path: Path) -> None:
    model = tiny_model("llama").eval()
    add_gated_head(model)
    model = dispatch_model(model, {"model": "cpu", "lm_head": "disk"}, offload_dir=tmp_path)
    with pytest.raises(ValueError, match="lm_head's weight is offloaded"):
        model(**batch)


def root_alone(model: PreTrainedModel) -> list[nn.Module | list[nn.Module]]:
    return [*model.model.layers]


def lm_head_alone(model: PreTrainedModel) -> list[nn.Module | list[nn.Module]]:
    return [*model.model.layers, model.lm_head]


def lm_head_with_norm(model: PreTrainedModel) -> list[nn.Module | list[nn.Module]]:
    return [*model.model.layers, [model.model.norm, model.lm_head]]


RANKS = 2


@pytest.mark.parametrize("parts", [root_alone, lm_head_alone, lm_head_with_norm])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_fsdp_gives_the_mean_gradient_of_the_ranks(
    architecture: str, parts: Callable[[PreTrainedModel], list], tmp_path: Path
) -> None:
    def train(rank: int) -> None:
        mesh = init_device_mesh("cpu", (RANKS,))
        batches = [make_batch(seed=seed) for seed in range(RANKS)]
        model = tiny_model(architecture).double()
        loss = sum(formula_loss(model, batch) for batch in batches) / RANKS
        expected = gradients(model, loss)

        add_gated_head(model)
        for part in parts(model):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # Twice, since the first pass sets FSDP up.
        for _ in range(2):
            model.zero_grad()
            model(**batches[rank]).loss.backward()

        actual = {name: value.grad.full_tensor() for name, value in model.named_parameters()}
        assert_same_gradients(actual, expected, 1e-9)

    run_ranks(train, tmp_path)


def test_a_vocabulary_sharded_by_tensor_parallelism_equals_the_formula(
    batch: Batch, tmp_path: Path
) -> None:
    def train(rank: int) -> None:
        mesh = init_device_mesh("cpu", (RANKS,))
        model = tiny_model("llama").double()
        loss = formula_loss(model, batch)
        expected = gradients(model, loss)

        add_gated_head(model)
        weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
        model.lm_head.weight = nn.Parameter(weight)

        actual = gradients(model, model(**batch).loss)
        actual["lm_head.weight"] = actual["lm_head.weight"].full_tensor()
        assert_same_gradients(actual, expected, 1e-9)

    run_ranks(train, tmp_path)
