"""What cannot have a gated head is refused when the head is added, with what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
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


class Shuffled(LlamaForCausalLM):
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.flip(-1)
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, output.logits.size(-1))
        return output


class Twice(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.lm_head(self.model.embed_tokens.weight[:4])
        return super().forward(*args, **kwargs)


class Unshifted(LlamaForCausalLM):
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if labels is not None:
            output.loss = nn.functional.cross_entropy(output.logits[0], labels[0])
        return output


class Regularised(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.aux_loss = output.logits.new_ones(())
        if output.loss is not None:
            output.loss = output.loss + 0.123 * output.aux_loss
        return output


class Smoothed(LlamaForCausalLM):
    def loss_function(self, logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        return nn.functional.cross_entropy(
            logits[0, :-1].float(), labels[0, 1:], label_smoothing=0.1
        )


class Unlike(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return self.lm_head(self.model.embed_tokens(input_ids))


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (
            Hotter,
            "Hotter's own forward returns another logits than those that its loss is of.*gated_loss",
        ),
        (Shuffled, "Shuffled's own forward gives another logits than its lm_head's"),
        (Twice, "calls its lm_head 2 times"),
        (Unshifted, "Unshifted's own forward gives another loss"),
        (Smoothed, "Smoothed's own forward gives another loss"),
        (Regularised, "adds 0.123 to its loss, which no coefficient of its configuration"),
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
