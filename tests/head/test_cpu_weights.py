"""QLoRA on a CPU: a 4-bit base model trains alike with and without evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deft_plugin import add_gated_head, keep_cpu_weights_unpacked

from ..tiny import tiny_model
from .oracle import assert_same_gradients, formula_loss, gradients, make_batch

bitsandbytes = pytest.importorskip("bitsandbytes")

packs_on_this_cpu = pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(),
    reason="bitsandbytes packs 4-bit weights only on a CPU with AVX512_BF16",
)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def load_qlora(path: Path) -> Any:
    torch.manual_seed(0)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.float32
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )


def evaluate(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(**make_batch(seed=1))
    model.train()


def train(model: Any, evaluations: bool) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(**make_batch(seed=step)).loss.backward()
        optimizer.step()
        if evaluations:
            evaluate(model)
    return {name: p.detach().clone() for name, p in parameters.items()}


def test_lora_gradients_over_a_4_bit_base_equal_the_formula(base_path: Path) -> None:
    model = load_qlora(base_path)
    batch = make_batch()
    assert type(model.get_base_model().lm_head) is nn.Linear
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)

    add_gated_head(model)
    output = model(**batch)

    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(model, output.loss), expected, 1e-4)


def test_evaluations_do_not_change_the_training(base_path: Path) -> None:
    results = []
    for evaluations in (False, True):
        model = load_qlora(base_path)
        add_gated_head(model)
        assert keep_cpu_weights_unpacked(model) == 2 * 7
        results.append(train(model, evaluations))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=0, msg=name)


@packs_on_this_cpu
def test_a_model_that_was_evaluated_without_the_guard_is_refused(base_path: Path) -> None:
    model = load_qlora(base_path)
    evaluate(model)
    with pytest.raises(ValueError, match=r"packed .* Load the model again"):
        keep_cpu_weights_unpacked(model)


@packs_on_this_cpu
def test_the_guard_is_still_needed(base_path: Path) -> None:
    """When bitsandbytes keeps the gradients of packed layers, the guard can go."""
    plain, evaluated = load_qlora(base_path), load_qlora(base_path)
    for model in (plain, evaluated):
        add_gated_head(model)
    expected, actual = train(plain, evaluations=False), train(evaluated, evaluations=True)
    assert any(not torch.equal(actual[name], value) for name, value in expected.items())
