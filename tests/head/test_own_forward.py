"""What a model's own forward does is found out, whenever its weights are there; nothing is taken from its name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import AdaptionPromptConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput, MoeCausalLMOutputWithPast

from deft_plugin import add_gated_head

from ..distributed.ranks import run_ranks
from ..tiny import tiny_model
from .oracle import (
    Batch,
    assert_like_formula,
    formula_loss,
    gradients,
    make_batch,
    without_labels,
)


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
    loss = own_loss(model, batch)
    model.config.return_dict = False

    add_gated_head(model, "nll")

    torch.testing.assert_close(model(**batch)[0], loss)
    assert model.config.return_dict is False


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


def test_a_wrapper_that_keeps_the_old_forward_is_given_the_new_one(batch: Batch) -> None:
    """PEFT's AdaptionPromptModel binds its base model's forward when it is made."""
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
    model = get_peft_model(tiny_model("llama"), config)
    own = model(**batch)

    head = add_gated_head(model, "p")
    output = model(**batch)

    assert output.loss.item() == pytest.approx((1 - output.log_p.exp())[output.label_mask].mean())
    head.remove()
    assert torch.equal(model(**batch).loss, own.loss)


def test_logits_that_are_not_there_say_why(batch: Batch) -> None:
    model = tiny_model("llama")
    add_gated_head(model)
    with pytest.raises(AttributeError, match=r"no logits\. Call the model without labels"):
        _ = model(**batch).logits


def test_an_evaluation_by_another_trainer_says_that_its_predictions_are_no_logits(
    batch: Batch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    add_gated_head(model)
    rows = [{name: value[row] for name, value in batch.items()} for row in range(3)]
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, eval_dataset=rows)
    with caplog.at_level(logging.WARNING, "deft_plugin"):
        trainer.evaluate()
        trainer.predict(rows)
    assert len(caplog.records) == 1
    assert "predictions are no logits" in caplog.text


def test_a_loss_outside_the_trainer_is_said_to_be_no_nll_once(
    batch: Batch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    head = add_gated_head(model)
    with caplog.at_level(logging.WARNING, "deft_plugin"):
        model(**batch)
        with head.observed_by(lambda gated: None):
            model(**batch)
        assert not caplog.records
        model(**without_labels(batch))
        assert not caplog.records
        model(**batch)
        model(**batch)
    assert [record.getMessage().count("no perplexity") for record in caplog.records] == [1]


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
