"""An lm_head whose vocabulary is spread over ranks has the loss and the gradients of the whole one."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from deft_plugin import GatedLoss, add_gated_head, linear_gated_loss
from deft_plugin.head.taken_apart import projection_of
from deft_plugin.ops.shard import VocabularyShard

from ..head.oracle import make_batch
from ..ops.cases import OBJECTIVES, Case, gated, gradients, largest_error, random_case
from ..tiny import tiny_model
from .ranks import run_ranks

STATISTICS = ("log_p", "gate", "focus", "entropy", "is_top1", "token_loss")


def shard_of(case: Case) -> tuple[Case, VocabularyShard]:
    """This rank's rows of the case, as torch deals them out, as leaves of their own."""
    shard = VocabularyShard(distributed.group.WORLD, case.weight.size(0))

    def own(tensor: Tensor) -> Tensor:
        rows = slice(shard.first, shard.first + shard.size)
        return tensor.detach()[rows].requires_grad_(tensor.requires_grad)

    part = dataclasses.replace(
        case.to(case.hidden.dtype),
        weight=own(case.weight),
        bias=None if case.bias is None else own(case.bias),
        low_rank_weight=None if case.low_rank_weight is None else own(case.low_rank_weight),
    )
    return part, shard


def compare(
    case: Case, objective: str, parameters: dict[str, Any], tolerance: float = 1e-10, **options: Any
) -> None:
    """Loss, statistics and gradients of this rank's part against those of the whole."""
    part, shard = shard_of(case)

    def scored(case: Case, **more: Any) -> tuple[GatedLoss, list[Tensor]]:
        result = gated(
            "chunked",
            case,
            objective,
            parameters=parameters,
            with_entropy=True,
            tile_rows=5,
            **options,
            **more,
        )
        # Unequal upstream gradients beside the loss's own.
        weights = torch.linspace(0, 2, result.token_loss.numel(), dtype=result.token_loss.dtype)
        losses = (result.loss, (result.token_loss * weights).sum())
        return result, [g for loss in losses for g in gradients(loss, case, retain_graph=True)]

    (whole, expected), (result, actual) = scored(case), scored(part, shard=shard)
    for name in STATISTICS:
        value, reference = getattr(result, name), getattr(whole, name)
        assert (value is None) == (reference is None), name
        if value is not None:
            torch.testing.assert_close(value, reference, rtol=tolerance, atol=tolerance, msg=name)
    rows = slice(shard.first, shard.first + part.weight.size(0))
    for index, leaf in enumerate([*case.leaves(), *case.leaves()]):
        if leaf is not case.hidden and leaf is not case.low_rank_hidden:
            expected[index] = expected[index][rows]
    assert largest_error(actual, expected, smallest_norm=1e-30) < tolerance


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_objective_has_the_loss_and_gradients_of_the_whole(
    world_size: int, tmp_path: Path
) -> None:
    def on(rank: int) -> None:
        for name, parameters in OBJECTIVES:
            case = random_case(
                12,
                41,
                bias=True,
                logit_scale=0.8,
                softcap=15.0,
                masked_share=0.25,
                logit_std=(0.1, 20),
            )
            compare(case, name, parameters)
        for trainable in (["hidden"], ["weight"], ["hidden", "bias"]):
            case = random_case(12, 41, bias="bias" in trainable, trainable=trainable)
            compare(case, "deft", {})
            compare(case, "cayley_trans", {})
        for trainable in (
            ["hidden", "low_rank_hidden", "low_rank_weight"],
            ["low_rank_weight"],
            ["hidden"],
            ["hidden", "weight", "bias", "low_rank_hidden", "low_rank_weight"],
        ):
            case = random_case(
                12, 41, rank=3, bias=True, softcap=15.0, masked_share=0.25, trainable=trainable
            )
            compare(case, "deft", {})
            compare(case, "cayley_trans", {})
        compare(random_case(64, 41), "deft", {}, skip_below=0.01)
        compare(random_case(12, 41, dtype=torch.float32), "deft", {}, 1e-5)
        compare(random_case(12, 41, dtype=torch.bfloat16), "deft", {}, 2e-2)

    run_ranks(on, tmp_path, world_size)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_edges_are_those_of_the_whole(world_size: int, tmp_path: Path) -> None:
    def on(rank: int) -> None:
        # Ranks without any token of the vocabulary; no targets; none that counts.
        for vocab_size in (1, 2, 5, 6):
            compare(random_case(7, vocab_size, bias=True, rank=2), "eaft", {"k": 3})
        compare(random_case(0, 41), "deft", {})
        compare(random_case(7, 41, masked_share=1.0), "cayley_trans", {})
        # Logits far apart on different ranks, and a part of the vocabulary that is -inf.
        case = random_case(6, 6, identity=True, trainable=["hidden"])
        for gap in (1e-30, 1.0, 80.0, 1e4):
            hidden = torch.zeros(6, 6, dtype=torch.float64)
            hidden[:, 2] = gap
            far = dataclasses.replace(case, hidden=hidden.requires_grad_(), targets=torch.arange(6))
            compare(far, "deft", {})
        padded = random_case(6, 6, bias=True, trainable=["hidden"])
        assert padded.bias is not None
        padded.bias.data[3:] = -torch.inf
        compare(dataclasses.replace(padded, targets=padded.targets % 3), "deft", {})

    run_ranks(on, tmp_path, world_size)


def test_nan_in_one_part_is_seen_by_all(tmp_path: Path) -> None:
    def on(rank: int) -> list[list[bool]]:
        case = random_case(3, 8, identity=True, trainable=["hidden"])
        hidden = case.hidden.detach().clone()
        hidden[1, 5] = torch.nan
        part, shard = shard_of(dataclasses.replace(case, hidden=hidden.requires_grad_()))
        result = gated("chunked", part, shard=shard)
        return [result.token_loss.isnan().tolist(), result.is_top1[1:2].tolist()]

    for rank in run_ranks(on, tmp_path):
        # The projection spreads a NaN over its row and no other.
        assert rank == [[False, True, False], [False]]


def test_targets_are_checked_against_the_whole_vocabulary(tmp_path: Path) -> None:
    def on(rank: int) -> None:
        shard = VocabularyShard(distributed.group.WORLD, 8)
        hidden, weight = torch.randn(2, 3), torch.randn(4, 3)
        linear_gated_loss(hidden, weight, torch.tensor([0, 7]), shard=shard)
        with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 8\)"):
            linear_gated_loss(hidden, weight, torch.tensor([0, 8]), shard=shard)
        for rows in (3, 5):
            with pytest.raises(
                ValueError, match=rf"weight has {rows} rows, and .* is 4, from {4 * rank}"
            ):
                linear_gated_loss(hidden, torch.randn(rows, 3), torch.tensor([0, 7]), shard=shard)
        for path in ("triton", "quack", "reference"):
            with pytest.raises(
                ValueError, match=f"path='{path}' cannot run on a sharded vocabulary"
            ):
                linear_gated_loss(hidden, weight, torch.tensor([0, 7]), shard=shard, path=path)

    run_ranks(on, tmp_path)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name."""
    return {
        name: value.grad.full_tensor() if hasattr(value.grad, "full_tensor") else value.grad
        for name, value in model.named_parameters()
        if value.grad is not None
    }


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_tensor_parallel_model_has_the_gradients_of_the_whole(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    model = tiny_model(architecture, num_key_value_heads=2, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    batch = make_batch(length=12, seed=1)

    def on(rank: int) -> tuple[float, dict[str, Tensor]]:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", distributed_config=DistributedConfig(tp_size=2)
        )
        assert model.lm_head.weight.placements == (Shard(0),)
        add_gated_head(model)
        loss = model(**batch).loss
        loss.backward()
        return loss.item(), gradients_of(model)

    add_gated_head(model)
    expected = model(**batch).loss
    expected.backward()
    for loss, actual in run_ranks(on, tmp_path):
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        reference = gradients_of(model)
        assert actual.keys() == reference.keys()
        assert largest_error(list(actual.values()), list(reference.values())) < 1e-5


def test_torchs_own_colwise_lm_head_and_other_placements(tmp_path: Path) -> None:
    batch = make_batch(length=12, seed=1)

    def on(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        model, reference = tiny_model("llama"), tiny_model("llama")
        parallelize_module(model.lm_head, mesh, ColwiseParallel())
        for each in (model, reference):
            add_gated_head(each)
            each(**batch).loss.backward()
        actual, expected = gradients_of(model), gradients_of(reference)
        assert actual.keys() == expected.keys()
        assert largest_error(list(actual.values()), list(expected.values())) < 1e-5

        nested = tiny_model("llama")
        both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(nested.lm_head, both["tp"], ColwiseParallel())
        add_gated_head(nested)
        fully_shard(nested.lm_head, mesh=both["dp"])
        with pytest.raises(ValueError, match="do not call fully_shard"):
            nested(**batch)

        weight = distribute_tensor(reference.lm_head.weight.detach(), mesh, [Shard(1)])
        model.lm_head.weight = nn.Parameter(weight)
        with pytest.raises(ValueError, match=r"Shard\(dim=0\).*colwise"):
            model(**batch)

    run_ranks(on, tmp_path)


@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed not installed")
def test_shards_of_deepspeed_that_are_uneven_or_of_columns_are_refused(tmp_path: Path) -> None:
    def on(rank: int) -> None:
        from deepspeed import init_distributed
        from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

        init_distributed(dist_backend="gloo")
        hidden = torch.randn(2, 6)
        linear = nn.Linear(6, 9)
        expected = linear.weight.detach()[3 * rank : 3 * rank + 3].clone()
        projection = projection_of(LinearLayer(linear, distributed.group.WORLD), hidden)
        assert torch.equal(projection.weight, expected)
        assert projection.shard == VocabularyShard(distributed.group.WORLD, 9)
        for kind, rows in ((LinearLayer, 10), (LinearAllreduce, 9)):
            layer = kind(nn.Linear(6, rows), distributed.group.WORLD)
            with pytest.raises(ValueError, match=f"{kind.__name__}.*vocabulary that 3 divides"):
                projection_of(layer, hidden)
        # As in DeepSpeed 0.19.5.
        del layer._partition_sizes
        with pytest.raises(ValueError, match=r"LinearAllreduce.*0\.19\.8"):
            projection_of(layer, hidden)

    run_ranks(on, tmp_path, 3)
