"""What cannot have a gated head is refused when the head is added, with what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from deft_plugin import add_gated_head

from ..tiny import tiny_model

TINY_ENCODER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


def text_config(architecture: str = "llama", **overrides: Any) -> Any:
    return tiny_model(architecture, num_hidden_layers=1, **overrides).config


def vision_language_model() -> PreTrainedModel:
    vision = AutoConfig.for_model(
        "clip_vision_model", **TINY_ENCODER, num_attention_heads=1, image_size=8, patch_size=4
    )
    config = AutoConfig.for_model(
        "llava", vision_config=vision, text_config=text_config(), image_token_index=5
    )
    return AutoModelForImageTextToText.from_config(config)


def encoder_decoder() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "bart", vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1
    )
    return AutoModelForSeq2SeqLM.from_config(config)


def masked_lm() -> PreTrainedModel:
    config = AutoConfig.for_model("bert", vocab_size=64, num_attention_heads=1, **TINY_ENCODER)
    return AutoModelForMaskedLM.from_config(config)


def without_lm_head() -> PreTrainedModel:
    return AutoModel.from_config(text_config())


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (vision_language_model, "Llava.* is multi-modal"),
        (encoder_decoder, "Bart.* is not a decoder-only causal LM.*gated_loss"),
        (masked_lm, "Bert.* is not a decoder-only causal LM"),
        (without_lm_head, "LlamaModel has no lm_head"),
        (lambda: nn.Linear(2, 2), "Linear is not a Hugging Face causal LM"),
        (lambda: torch.compile(tiny_model("llama")), "OptimizedModule .* before torch.compile"),
    ],
)
def test_models_of_another_kind_are_refused(make_model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_gated_head(make_model())


class Hotter(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.1
        return output


class Unshifted(LlamaForCausalLM):
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if labels is not None:
            output.loss = nn.functional.cross_entropy(output.logits[0], labels[0])
        return output


class WithAuxiliaryLoss(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.aux_loss = output.logits.new_ones(())
        return output


class Unlike(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return self.lm_head(self.model.embed_tokens(input_ids))


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (Hotter, "Hotter's own forward gives another logits .* differs by .*gated_loss"),
        (Unshifted, "Unshifted's own forward gives another loss"),
        (WithAuxiliaryLoss, "another auxiliary loss than the gated head: the model has one"),
        (Unlike, "does not have the form backbone, lm_head, logits.*gated_loss"),
    ],
)
def test_a_forward_that_treats_logits_or_labels_in_an_unknown_way_is_refused(
    model_class: Any, message: str
) -> None:
    model = model_class(text_config())
    before = dict(vars(model)), dict(vars(model.model))
    with pytest.raises(ValueError, match=message):
        add_gated_head(model)
    assert (vars(model), vars(model.model)) == before


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        # Caps its logits under a name of its own.
        ("recurrent_gemma", {"lru_width": 32, "logits_soft_cap": 9.0}),
        # Its auxiliary loss has a coefficient under a name of its own.
        ("jetmoe", {"num_local_experts": 4, "kv_channels": 16, "output_router_logits": True}),
    ],
)
def test_an_architecture_unknown_to_the_head_is_refused(
    architecture: str, overrides: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"gated_loss"):
        add_gated_head(tiny_model(architecture, **overrides))


@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16])
def test_a_quantised_lm_head_is_refused(quant_storage: torch.dtype) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model("llama")
    model.lm_head = bitsandbytes.nn.Linear4bit(
        32, 128, bias=False, quant_type="nf4", quant_storage=quant_storage
    ).to("cpu")
    with pytest.raises(ValueError, match=r"lm_head is quantised .*llm_int8_skip_modules"):
        add_gated_head(model)


def test_an_lm_head_that_is_no_linear_layer_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(nn.Linear(32, 128))
    with pytest.raises(ValueError, match=r"lm_head is a Sequential; .* torch\.nn\.Linear"):
        add_gated_head(model)


def test_a_second_head_is_refused() -> None:
    model = tiny_model("llama")
    add_gated_head(model, "cayley")
    with pytest.raises(ValueError, match=r"has a gated head with Cayley.*remove\(\)"):
        add_gated_head(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "det"}, "Unknown objective 'det'. Did you mean 'deft'"),
        ({"objective": "alpha", "parameters": {"b": 1}}, "no parameter 'b'"),
        ({"path": "fast"}, "path='fast' is not valid. Choices: 'auto'"),
    ],
)
def test_a_bad_argument_leaves_the_model_as_it_was(arguments: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    before = dict(vars(model))
    with pytest.raises(ValueError, match=message):
        add_gated_head(model, **arguments)
    assert type(model) is LlamaForCausalLM
    assert vars(model) == before
