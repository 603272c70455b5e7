"""What cannot have a gated head is refused when the head is added, with what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from deft_plugin import add_gated_head

from ..tiny import tiny_model
from .oracle import assert_equals_formula, make_batch

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


class SmoothedInTraining(LlamaForCausalLM):
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if labels is not None:
            smoothing = 0.1 if self.training else 0.0
            logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output.loss = nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
        return output


class MeanOfMeans(LlamaForCausalLM):
    def loss_function(self, logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        rows = zip(logits[:, :-1], labels[:, 1:], strict=True)
        return torch.stack([nn.functional.cross_entropy(*row) for row in rows]).mean()


class LearnedScale(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.logit_scale
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, output.logits.size(-1))
        return output


class Wider(LearnedScale):
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super(LearnedScale, self).forward(*args, **kwargs)
        output.logits = nn.functional.pad(output.logits, (0, 16))
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, output.logits.size(-1))
        return output


class _Warp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        (logits,) = ctx.saved_tensors
        return upstream, 1e-4 * logits * (logits == logits.amax(-1, keepdim=True))


class Warped(LlamaForCausalLM):
    """A regularisation that shows in the gradient alone, as RWKV's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = _Warp.apply(output.loss, output.logits)
        return output


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
        (SmoothedInTraining, "SmoothedInTraining's own forward gives another loss"),
        (MeanOfMeans, "MeanOfMeans's own forward gives another loss"),
        (LearnedScale, "computes its logits with logit_scale after its lm_head"),
        (Wider, "gives 144 logits, 16 of them not its lm_head's"),
        (Warped, "gradient in its logits is not that of cross-entropy"),
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


def test_a_head_in_a_checkpoint_without_gradients_is_refused() -> None:
    class Checkpointed(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            embeddings = self.model.embed_tokens(input_ids)
            logits = checkpoint(
                lambda x: self.lm_head(self.model.norm(x)), embeddings, use_reentrant=True
            )
            return CausalLMOutput(self.loss_function(logits, labels, logits.size(-1)), logits)

    model = Checkpointed(text_config())
    add_gated_head(model)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="where no gradients are recorded"):
        model(input_ids=ids, labels=ids)


def test_a_hook_that_changes_logits_is_refused_and_one_that_looks_on_is_not() -> None:
    model = tiny_model("llama")
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    add_gated_head(model).remove()
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="lm_head has a hook that changes its logits"):
        add_gated_head(model)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "put_on",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.2),
    ],
)
def test_a_weight_that_a_hook_makes_is_refused(put_on: Any) -> None:
    model = tiny_model("llama")
    put_on(model.lm_head)
    with pytest.raises(ValueError, match="weight is made anew by a hook"):
        add_gated_head(model)


def test_an_lm_head_that_is_no_linear_layer_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(nn.Linear(32, 128))
    with pytest.raises(ValueError, match=r"lm_head is a Sequential; .* torch\.nn\.Linear"):
        add_gated_head(model)


def test_a_linear_layer_of_an_unknown_class_is_compared() -> None:
    class Scaled(nn.Linear):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) * 2

    class Same(nn.Linear):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states)

    for kind in (Scaled, Same):
        model = tiny_model("llama").double()
        layer = kind(32, 128, bias=False).double()
        layer.weight = model.lm_head.weight
        model.lm_head = layer
        if kind is Same:
            assert_equals_formula(model, make_batch())
        else:
            with pytest.raises(ValueError, match="a Scaled, gives other logits than its weight"):
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
