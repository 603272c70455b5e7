"""The gated head under PEFT: adapters train as the formula on the PEFT model's own logits has it."""

from __future__ import annotations

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import PreTrainedModel

from deft_plugin import add_gated_head, gated_head_of

from ..tiny import tiny_model
from .oracle import Batch, assert_like_formula, formula_loss, gradients, make_batch

TASK = "CAUSAL_LM"
LORA = LoraConfig(task_type=TASK, r=4, init_lora_weights=False, target_modules="all-linear")
LORA_AND_HEAD = LoraConfig(
    task_type=TASK, r=4, init_lora_weights=False, modules_to_save=["lm_head"]
)
PROMPT = PromptTuningConfig(task_type=TASK, num_virtual_tokens=3)
PREFIX = PrefixTuningConfig(task_type=TASK, num_virtual_tokens=3)

adapters = pytest.mark.parametrize(
    "adapter",
    [LORA, LORA_AND_HEAD, PROMPT, PREFIX],
    ids=["lora", "lora and lm_head", "prompt tuning", "prefix tuning"],
)


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def with_adapter(adapter: PeftConfig, model: PreTrainedModel | None = None) -> PeftModel:
    torch.manual_seed(0)
    base = tiny_model("qwen2").double() if model is None else model
    return get_peft_model(base, adapter).double()


@adapters
@pytest.mark.parametrize("head_first", [False, True])
def test_loss_and_gradients_equal_the_formula(
    adapter: PeftConfig, head_first: bool, batch: Batch
) -> None:
    model = with_adapter(adapter)
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)

    if head_first:
        base = tiny_model("qwen2").double()
        add_gated_head(base)
        model = with_adapter(adapter, base)
    else:
        add_gated_head(model)

    assert_like_formula(model, loss, expected, batch)


@pytest.mark.parametrize("adapter", [LORA, LORA_AND_HEAD], ids=["lora", "lora and lm_head"])
def test_a_disabled_adapter_is_out_of_the_loss_too(adapter: PeftConfig, batch: Batch) -> None:
    model = with_adapter(adapter)
    if adapter is LORA_AND_HEAD:
        with torch.no_grad():
            model.get_base_model().lm_head.weight.mul_(2)
    with model.disable_adapter():
        expected = formula_loss(model, batch)
    add_gated_head(model)

    with model.disable_adapter():
        loss = model(**batch).loss

    torch.testing.assert_close(loss, expected)
    assert model(**batch).loss.item() != loss.item()


def test_a_merged_model_keeps_its_head(batch: Batch) -> None:
    model = with_adapter(LORA)
    add_gated_head(model)
    expected = model(**batch).loss

    merged = model.merge_and_unload()

    assert gated_head_of(merged) is not None
    torch.testing.assert_close(merged(**batch).loss, expected)


def test_the_head_sits_on_the_base_model_and_comes_off_it() -> None:
    model = with_adapter(LORA)
    head = add_gated_head(model)
    assert gated_head_of(model) is gated_head_of(model.get_base_model()) is head
    head.remove()
    assert gated_head_of(model) is None
