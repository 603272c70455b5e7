"""Adapters on the lm_head and beside it: the formula on the layer's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
)
from torch import nn
from transformers import PreTrainedModel

from deft_plugin import add_gated_head

from ..tiny import tiny_model
from .oracle import (
    Batch,
    assert_equals_formula,
    assert_like_formula,
    formula_loss,
    gradients,
    make_batch,
)
from .test_architectures import LargestTensor

TASK = "CAUSAL_LM"


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(
        task_type=TASK, r=4, target_modules=[*targets], init_lora_weights=False, **options
    )


def with_adapter(config: PeftConfig, base: PreTrainedModel) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base, config).double()


@pytest.mark.parametrize("objective", ["deft", "cayley_trans", "nll"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"lora_bias": True},
        {"modules_to_save": ["embed_tokens"]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "with bias", "with embed_tokens saved", "gaussian"],
)
def test_lora_on_lm_head_trains_as_the_formula(
    options: dict[str, Any], objective: str, batch: Batch
) -> None:
    config = LoraConfig(
        **{
            "task_type": TASK,
            "r": 4,
            "target_modules": ["q_proj", "lm_head"],
            "init_lora_weights": False,
            **options,
        }
    )
    if options.get("init_lora_weights"):
        model = with_adapter(config, tiny_model("qwen2").double())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    else:
        model = with_adapter(config, tiny_model("qwen2").double())
    assert_equals_formula(model, batch, objective)


def test_lora_on_lm_head_through_a_softcap(batch: Batch) -> None:
    assert_equals_formula(with_adapter(lora("lm_head"), tiny_model("gemma2").double()), batch)


def test_several_adapters_on_lm_head_are_added_up(batch: Batch) -> None:
    model = with_adapter(lora("lm_head"), tiny_model("qwen2").double())
    model.add_adapter("second", LoraConfig(task_type=TASK, r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "second" in name:
            nn.init.normal_(parameter, std=0.1)
    assert_equals_formula(model.double(), batch)


def test_dropout_before_lora_on_lm_head_is_the_layers_own(batch: Batch) -> None:
    model = with_adapter(lora("lm_head", lora_dropout=0.5), tiny_model("qwen2").double())
    torch.manual_seed(1)
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)
    add_gated_head(model)
    torch.manual_seed(1)
    actual = model(**batch).loss
    torch.testing.assert_close(actual, loss)
    for name, gradient in gradients(model, actual).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("how", ["disabled", "merged"])
def test_lora_on_lm_head_can_be_taken_out_and_merged(how: str, batch: Batch) -> None:
    model = with_adapter(lora("lm_head"), tiny_model("qwen2").double())
    add_gated_head(model)
    whole = model(**batch).loss
    if how == "merged":
        model.merge_adapter()
        torch.testing.assert_close(model(**batch).loss, whole)
        torch.testing.assert_close(model(**batch).loss, formula_loss(model, batch))
        return
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).loss, formula_loss(model, batch))
        assert model(**batch).loss.item() != pytest.approx(whole.item(), rel=1e-3)


def test_lora_that_is_put_on_lm_head_after_the_head_trains(batch: Batch) -> None:
    base = tiny_model("qwen2").double()
    add_gated_head(base)
    model = with_adapter(lora("lm_head"), base)
    loss = formula_loss(model, batch)
    assert_like_formula(model, loss, gradients(model, loss), batch)


def test_lora_on_lm_head_builds_no_logits() -> None:
    vocab_size = 1024
    model = with_adapter(lora("lm_head"), tiny_model("qwen2", vocab_size=vocab_size)).float()
    add_gated_head(model, tile_rows=8)
    batch = make_batch(rows=8, length=32)
    with LargestTensor() as recorder:
        model(**batch).loss.backward()
    # A tile of logits, and views of the weight, which is (V, 32).
    assert 8 * vocab_size <= recorder.largest <= 32 * vocab_size
    assert model.get_base_model().lm_head.base_layer.weight.grad is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora("lm_head", use_dora=True), "is Dora.*plain LoRA.*modules_to_save"),
        (IA3Config(task_type=TASK, target_modules=["lm_head"], feedforward_modules=[]), "ia3"),
    ],
)
def test_other_adapters_on_lm_head_are_refused(
    config: PeftConfig, message: str, batch: Batch
) -> None:
    with pytest.raises(ValueError, match=message):
        add_gated_head(with_adapter(config, tiny_model("qwen2").double()))
    # Put there later, in the forward.
    base = tiny_model("qwen2").double()
    add_gated_head(base)
    model = with_adapter(config, base)
    with pytest.raises(ValueError, match=message):
        model(**batch)


TOKENS = [5, 6, 7, 60]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "config",
    [
        lora("q_proj", trainable_token_indices=TOKENS),
        TrainableTokensConfig(task_type=TASK, token_indices=TOKENS, init_weights=False),
        LoraConfig(
            task_type=TASK,
            r=4,
            init_lora_weights=False,
            modules_to_save=["embed_tokens", "lm_head"],
        ),
    ],
    ids=["beside lora", "alone", "both saved"],
)
def test_new_tokens_train_in_embeddings_and_lm_head(
    config: PeftConfig, tied: bool, batch: Batch
) -> None:
    model = with_adapter(config, tiny_model("qwen3", tie_word_embeddings=tied).double())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    assert_equals_formula(model, batch)


def test_lora_on_tied_embeddings_trains_in_lm_head_too(batch: Batch) -> None:
    config = lora("embed_tokens", ensure_weight_tying=True)
    model = with_adapter(config, tiny_model("qwen3", tie_word_embeddings=True).double())
    assert_equals_formula(model, batch)


def test_lora_on_a_4_bit_lm_head(batch: Batch) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", hidden_size=64)
    layer = bitsandbytes.nn.Linear4bit(
        64, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32
    )
    layer.load_state_dict({"weight": model.lm_head.weight.detach().clone()})
    model.lm_head = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    model = get_peft_model(model, lora("lm_head"))
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)
    add_gated_head(model)
    assert_like_formula(model, loss, expected, batch, tolerance=1e-4)
