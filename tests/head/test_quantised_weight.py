"""An lm_head that is quantised: the formula on the layer's own logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deft_plugin import add_gated_head

from ..tiny import tiny_model
from .oracle import Batch, assert_like_formula, formula_loss, gradients, make_batch


@pytest.fixture
def batch() -> Batch:
    return make_batch()


@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16])
def test_a_4_bit_lm_head_is_made_whole_in_each_forward(
    quant_storage: torch.dtype, batch: Batch
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", hidden_size=64)
    layer = bitsandbytes.nn.Linear4bit(
        64,
        128,
        bias=False,
        quant_type="nf4",
        quant_storage=quant_storage,
        compute_dtype=torch.float32,
    )
    layer.load_state_dict({"weight": model.lm_head.weight.detach().clone()})
    model.lm_head = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)
    add_gated_head(model)
    assert_like_formula(model, loss, expected, batch, tolerance=1e-4)


def test_an_8_bit_lm_head_is_near_the_layers_own_logits(batch: Batch) -> None:
    """Its own forward rounds hidden states to 8 bits too."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", hidden_size=64)
    layer = bitsandbytes.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": model.lm_head.weight.detach().clone()})
    model.lm_head = layer.to("cpu")
    loss = formula_loss(model, batch)
    add_gated_head(model)
    torch.testing.assert_close(model(**batch).loss.double(), loss, rtol=0.02, atol=0)


def test_a_fake_quantised_lm_head_is_scored_as_it_rounds(batch: Batch) -> None:
    """torchao's quantisation-aware training, as Axolotl's `qat` sets it up."""
    quantization = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")
    model = tiny_model("llama", hidden_size=64)
    config = qat.QATConfig(
        weight_config=qat.IntxFakeQuantizeConfig(torch.int4, group_size=32),
        activation_config=qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        step="prepare",
    )
    quantization.quantize_(model, config)
    assert type(model.lm_head) is not nn.Linear
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)
    add_gated_head(model)
    assert_like_formula(model, loss, expected, batch, tolerance=1e-4)
