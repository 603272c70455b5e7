"""What a model's own forward does is found out, whenever its weights are there; nothing is taken from its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput, MoeCausalLMOutputWithPast

from deft_plugin import add_gated_head

from ..tiny import tiny_model
from .oracle import (
    Batch,
    assert_like_formula,
    formula_loss,
    gradients,
    make_batch,
)


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def test_a_softcap_that_is_changed_later_is_followed(batch: Batch) -> None:
    model = tiny_model("gemma2").double()
    add_gated_head(model, "nll")
    capped = model(**batch).loss

    model.config.final_logit_softcapping = None

    uncapped = model(**batch).loss
    assert uncapped.item() != pytest.approx(capped.item(), rel=0.01)
    torch.testing.assert_close(uncapped, formula_loss(model, batch, "nll"))


def test_a_configuration_without_return_dict_is_no_obstacle(batch: Batch) -> None:
    model = tiny_model("qwen3")
    loss = model(**batch, use_cache=False).loss
    model.config.return_dict = False

    add_gated_head(model, "nll")

    torch.testing.assert_close(model(**batch)[0], loss)
    assert model.config.return_dict is False


def test_a_model_that_cuts_off_padded_columns_is_followed(batch: Batch) -> None:
    class Cut(LlamaForCausalLM):
        def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits[..., :110]
            if labels is not None:
                output.loss = self.loss_function(output.logits, labels, 110)
            return output

    model = Cut(tiny_model("llama").config).double()
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)
    add_gated_head(model)
    assert_like_formula(model, loss, expected, batch)


def test_a_forward_with_its_own_cross_entropy_is_run_without_labels(batch: Batch) -> None:
    class Old(LlamaForCausalLM):
        def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if labels is not None:
                logits = output.logits[:, :-1].flatten(0, 1)
                output.loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
            return output

    model = Old(tiny_model("llama").config).double()
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)
    add_gated_head(model)
    assert_like_formula(model, loss, expected, batch)


def test_a_model_of_another_vocabulary_than_its_configurations_is_scored_whole(
    batch: Batch,
) -> None:
    model = tiny_model("llama").double()
    model.resize_token_embeddings(140, pad_to_multiple_of=16)
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)
    add_gated_head(model)
    assert_like_formula(model, loss, expected, batch)


class Odd(LlamaForCausalLM):
    """Llama with something between logits and loss."""

    def change(self, logits: Tensor) -> Tensor:
        return logits

    def own_loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        loss: Tensor = self.loss_function(logits, labels, logits.size(-1))
        return loss

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Any:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        logits = self.change(self.lm_head(hidden))
        loss = None if labels is None else self.own_loss(logits, labels, attention_mask)
        return CausalLMOutput(loss, logits)


class MasksFirstLabels(Odd):
    def own_loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        labels = labels.clone()
        labels[:, :5] = -100
        return super().own_loss(logits, labels, mask)


class PassesShiftedLabels(Odd):
    def own_loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        loss: Tensor = self.loss_function(logits, None, logits.size(-1), shift_labels=labels)
        return loss


class DropsMaskedLabels(Odd):
    """As Gemma-3 and Llama-4 of transformers 5.16, Qwen2-Audio and GraniteSpeech do."""

    def own_loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        logits, labels = logits[:, :-1], labels[:, 1:]
        if mask is not None:
            kept = mask[:, 1:] != 0
            logits, labels = logits[kept], labels[kept]
        return nn.functional.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1))


class AddsAnotherCoefficient(Odd):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Any:
        output = super().forward(input_ids, attention_mask)
        auxiliary = output.logits.new_full((), 1.5)
        if labels is not None:
            logits = output.logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
            output.loss = loss + self.balance * auxiliary
        return MoeCausalLMOutputWithPast(output.loss, auxiliary, output.logits)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.balance = 0.02
        config.router_aux_loss_coef = 0.3


class WarmerInTraining(Odd):
    def change(self, logits: Tensor) -> Tensor:
        return logits / 2 if self.training else logits


class WarmerInTrainingWithALossOfItsOwn(WarmerInTraining, DropsMaskedLabels):
    pass


class AlmostOne(Odd):
    def change(self, logits: Tensor) -> Tensor:
        return 1.004 * logits


@pytest.mark.parametrize(
    "model_class",
    [
        MasksFirstLabels,
        PassesShiftedLabels,
        DropsMaskedLabels,
        AddsAnotherCoefficient,
        WarmerInTraining,
        WarmerInTrainingWithALossOfItsOwn,
        AlmostOne,
    ],
)
@pytest.mark.parametrize("partitioned", [False, True])
def test_what_lies_between_logits_and_loss_is_kept(model_class: Any, partitioned: bool) -> None:
    model = model_class(tiny_model("llama").config)
    model.train()
    ids = torch.randint(4, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    # Padding with labels, which a loss may leave out.
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    loss = model(**batch).loss
    expected = gradients(model, loss)
    weight = model.lm_head.weight
    kept = weight.data
    if partitioned:
        weight.data = kept.new_empty(0)

    add_gated_head(model, "nll")

    weight.data = kept
    output = model(**batch)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradients(model, output.loss), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["logit_scale", "loss_function"])
def test_what_is_changed_on_the_model_later_is_found(name: str, batch: Batch) -> None:
    model = tiny_model("cohere")
    add_gated_head(model, "nll")
    model(**batch)
    if name == "loss_function":
        model.loss_function = lambda logits, labels, vocab_size, **_: (
            2 * ForCausalLMLoss(logits, labels, vocab_size)
        )
        with pytest.raises(ValueError, match="gives another loss than cross-entropy"):
            model(**batch)
    else:
        model.logit_scale = 0.5
        without = tiny_model("cohere")
        without.load_state_dict(model.state_dict())
        without.logit_scale = 0.5
        assert model(**batch).loss.item() == pytest.approx(without(**batch).loss.item(), rel=1e-5)
