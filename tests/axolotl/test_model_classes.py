"""The model class that Axolotl brings itself and that can be imported: the gated head's nll is its own loss.

The other, Kimi-Linear's, cannot with transformers 5.16: what it imports from there is gone.
"""

from __future__ import annotations

import torch
from axolotl.model_support.bailing_hybrid.configuration_bailing_moe_v3 import BailingMoeV3Config
from axolotl.model_support.bailing_hybrid.modeling_bailing_moe_v3 import BailingMoeV3ForCausalLM

from deft_plugin import add_gated_head
from tests.head.oracle import assert_same_gradients, gradients, make_batch

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def test_nll_and_its_gradients_are_the_models_own() -> None:
    config = BailingMoeV3Config(
        **SMALL,
        num_experts_per_tok=2,
        moe_shared_expert_intermediate_size=32,
        n_group=1,
        topk_group=1,
        # No layer of linear attention, whose kernels are for GPUs.
        layer_group_size=1,
        rope_theta=1e4,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = BailingMoeV3ForCausalLM(config).train()
    batch = make_batch()
    own = model(**batch, use_cache=False).loss
    expected = gradients(model, own)
    add_gated_head(model, "nll")
    loss = model(**batch).loss
    torch.testing.assert_close(loss, own)
    assert_same_gradients(gradients(model, loss), expected, 1e-4)
