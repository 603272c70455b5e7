"""When a model's own forward is compared: before the head is put on, or as soon as its weights are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM, PreTrainedModel

from deft_plugin import add_gated_head

from ..distributed.ranks import run_ranks
from ..tiny import tiny_model
from .oracle import Batch, assert_like_formula, gradients, make_batch


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def modernbert_decoder() -> PreTrainedModel:
    """Has a dense layer and a norm between backbone and lm_head."""
    return tiny_model("modernbert-decoder", global_attn_every_n_layers=1, local_attention=8)


def opt() -> PreTrainedModel:
    """Calls `self.model.decoder`, not `self.model`, and projects out of a narrower space."""
    return tiny_model("opt", ffn_dim=64, word_embed_proj_dim=16, dropout=0.0, enable_bias=False)


def recurrent_gemma() -> PreTrainedModel:
    """Caps its logits under a name of its own."""
    return tiny_model(
        "recurrent_gemma",
        lru_width=32,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
        logits_soft_cap=5.0,
    )


unlike_llama = pytest.mark.parametrize(
    "make_model",
    [
        pytest.param(
            modernbert_decoder,
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.20"),
                reason="its configuration refuses its own default",
            ),
        ),
        opt,
        recurrent_gemma,
    ],
)


def own_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(**batch, use_cache=False).loss


@unlike_llama
def test_where_the_weights_are_partitioned_the_first_forward_finds_out(
    make_model: Callable[[], PreTrainedModel], batch: Batch
) -> None:
    model = make_model()
    loss = own_loss(model, batch)
    expected = gradients(model, loss)
    weight = model.get_output_embeddings().weight
    kept, weight.data = weight.data, weight.data.new_empty(0)  # As ZeRO-3 leaves it on a rank.

    add_gated_head(model, "nll")

    weight.data = kept
    assert_like_formula(model, loss, expected, batch, tolerance=1e-4)


@unlike_llama
def test_where_the_weights_are_on_meta_the_first_forward_finds_out(
    make_model: Callable[[], PreTrainedModel], batch: Batch
) -> None:
    model = make_model()
    loss = own_loss(model, batch).item()
    with torch.device("meta"):
        empty = make_model()

    add_gated_head(empty, "nll")

    loaded = empty.to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict())
    for name, buffer in model.named_buffers():
        loaded.get_buffer(name).copy_(buffer)
    assert loaded(**batch).loss.item() == pytest.approx(loss, rel=1e-5)


@unlike_llama
def test_where_the_weights_are_sharded_the_first_forward_finds_out(
    make_model: Callable[[], PreTrainedModel], batch: Batch, tmp_path: Path
) -> None:
    def train(rank: int) -> None:
        model = make_model()
        loss = own_loss(model, batch).item()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        add_gated_head(model, "nll")
        assert model(**batch).loss.item() == pytest.approx(loss, rel=1e-5)

    run_ranks(train, tmp_path)


class Shuffled(LlamaForCausalLM):
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.flip(-1)
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, output.logits.size(-1))
        return output


def test_what_is_found_out_late_is_refused_all_the_same(batch: Batch) -> None:
    model = Shuffled(tiny_model("llama").config).to("meta")
    add_gated_head(model, "nll")
    model = model.to_empty(device="cpu")
    with pytest.raises(ValueError, match="Shuffled's own forward gives another logits"):
        model(**batch)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral"])
def test_adding_a_head_draws_no_random_numbers_and_leaves_modes_alone(architecture: str) -> None:
    model = tiny_model(architecture, attention_dropout=0.5)
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()

    add_gated_head(model)

    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())
