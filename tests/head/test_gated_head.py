"""Every way a gated model may be called: arguments, modes, precisions; and what it says of its loss."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, Trainer, TrainingArguments

from deft_plugin import GatedCausalLMOutput, GatedLoss, add_gated_head, build_objective

from ..tiny import tiny_model
from .oracle import (
    Batch,
    assert_like_formula,
    assert_same_gradients,
    formula_loss,
    gradients,
    make_batch,
    without_labels,
)


@pytest.fixture
def batch() -> Batch:
    return make_batch()


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama").double()


def test_arguments_may_be_positional(model: PreTrainedModel, batch: Batch) -> None:
    add_gated_head(model)
    named = model(**batch)

    # Llama's order: input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels.
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    positional = model(ids, mask, None, None, None, labels)

    assert isinstance(positional, GatedCausalLMOutput)
    assert torch.equal(positional.loss, named.loss)
    assert torch.equal(model(ids, mask).logits, model(input_ids=ids, attention_mask=mask).logits)


def test_an_argument_given_twice_or_too_many_is_a_type_error(
    model: PreTrainedModel, batch: Batch
) -> None:
    add_gated_head(model)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'input_ids'"):
        model(batch["input_ids"], **batch)
    with pytest.raises(TypeError, match="too many positional arguments"):
        model(*[None] * 20, labels=batch["labels"])


@pytest.mark.parametrize("as_argument", [True, False])
def test_a_tuple_is_returned_where_it_is_asked_for(
    model: PreTrainedModel, batch: Batch, as_argument: bool
) -> None:
    add_gated_head(model)
    loss = model(**batch).loss

    if as_argument:
        output = model(**batch, return_dict=False)
    else:
        model.config.return_dict = False
        output = model(**batch)

    assert isinstance(output, tuple)
    assert torch.equal(output[0], loss)


def test_shift_labels_are_scored_where_they_stand(model: PreTrainedModel, batch: Batch) -> None:
    add_gated_head(model)
    expected = model(**batch)
    shift_labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    alone = model(**inputs, shift_labels=shift_labels)
    beside_labels = model(**batch, shift_labels=shift_labels)

    torch.testing.assert_close(alone.loss, expected.loss)
    torch.testing.assert_close(beside_labels.loss, expected.loss)
    assert alone.token_loss.shape == batch["labels"].shape
    torch.testing.assert_close(alone.token_loss[:, :-1], expected.token_loss)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_num_items_in_batch_divides_the_sum(
    model: PreTrainedModel, batch: Batch, as_tensor: bool
) -> None:
    add_gated_head(model)
    output = model(**batch)
    items = torch.tensor(1000) if as_tensor else 1000

    torch.testing.assert_close(
        model(**batch, num_items_in_batch=items).loss, output.token_loss.sum() / 1000
    )


def test_ignore_index_may_be_another(model: PreTrainedModel, batch: Batch) -> None:
    add_gated_head(model)
    expected = model(**batch).loss
    labels = batch["labels"].masked_fill(batch["labels"] == -100, 0)

    torch.testing.assert_close(model(**{**batch, "labels": labels}, ignore_index=0).loss, expected)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_no_label_at_all_gives_zero_loss_and_a_working_backward(architecture: str) -> None:
    model = tiny_model(architecture, output_router_logits=False)
    add_gated_head(model)
    batch = make_batch()
    batch["labels"][:] = -100

    loss = model(**batch).loss
    loss.backward()

    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.get_output_embeddings().weight.grad is not None


@pytest.mark.parametrize("logits_to_keep", [5, torch.tensor([1, 2])])
def test_logits_to_keep_with_labels_is_refused(
    model: PreTrainedModel, batch: Batch, logits_to_keep: Any
) -> None:
    add_gated_head(model)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**batch, logits_to_keep=logits_to_keep)


def test_output_holds_what_was_asked_for(model: PreTrainedModel, batch: Batch) -> None:
    add_gated_head(model, with_entropy=True)

    output = model(**batch, output_hidden_states=True)

    expected_mask = batch["labels"][:, 1:] != -100
    assert torch.equal(output.label_mask, expected_mask)
    for name in ("token_loss", "log_p", "gate", "focus", "entropy", "is_top1"):
        assert output[name].shape == expected_mask.shape
        assert not output[name][~expected_mask].any(), name
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert "logits" not in output


def test_entropy_is_left_out_unless_asked_for(model: PreTrainedModel, batch: Batch) -> None:
    add_gated_head(model)
    assert "entropy" not in model(**batch)


def test_an_observer_sees_every_gated_forward_in_its_context(
    model: PreTrainedModel, batch: Batch
) -> None:
    head = add_gated_head(model)
    seen: list[GatedLoss] = []

    model(**batch)
    with head.observed_by(seen.append):
        inside = model(**batch)
        model(input_ids=batch["input_ids"])
    model(**batch)

    assert [gated.loss for gated in seen] == [inside.loss]


def test_the_objective_may_be_changed_between_steps(model: PreTrainedModel, batch: Batch) -> None:
    expected = formula_loss(model, batch, "alpha", a=0.25)
    head = add_gated_head(model, "nll")

    head.objective = build_objective("alpha", {"a": 0.25})

    torch.testing.assert_close(model(**batch).loss, expected)


def test_evaluation_without_gradients_gives_the_training_loss(
    model: PreTrainedModel, batch: Batch
) -> None:
    add_gated_head(model)
    expected = model(**batch).loss

    model.eval()
    with torch.no_grad():
        loss = model(**batch).loss

    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(
    model: PreTrainedModel, batch: Batch, use_reentrant: bool
) -> None:
    add_gated_head(model)
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    # Reentrant checkpoints need an input with a gradient, as trainers know.
    model.enable_input_require_grads()
    model(**batch).loss.backward()

    assert model.is_gradient_checkpointing
    assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, expected, 1e-9)


def test_bfloat16_model_is_near_the_formula_on_its_own_logits(batch: Batch) -> None:
    model = tiny_model("llama", initializer_range=0.08).bfloat16()
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)

    add_gated_head(model)
    output = model(**batch)

    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), loss, rtol=0.01, atol=0)
    actual = gradients(model, output.loss)
    for name, value in expected.items():
        assert actual[name].dtype == torch.bfloat16
        error = (actual[name].float() - value.float()).norm() / value.float().norm()
        assert error < 0.03, name


def test_autocast_multiplies_in_its_dtype_and_sums_in_float32(batch: Batch) -> None:
    model = tiny_model("llama", initializer_range=0.08)
    add_gated_head(model)
    exact = model(**batch).loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss

    assert loss.dtype == torch.float32
    assert loss.item() != exact.item()
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)


@pytest.mark.parametrize("what", ["backbone", "model"])
def test_torch_compile_gives_the_same_gradients_from_one_set_of_graphs(what: str) -> None:
    model = tiny_model("llama", num_hidden_layers=1).double()
    batches = [make_batch(seed=seed) for seed in range(3)]
    for index, batch in enumerate(batches):
        batch["labels"][0, : 3 * index] = -100
    losses = [formula_loss(model, batch) for batch in batches]
    expected = [gradients(model, loss) for loss in losses]
    add_gated_head(model)
    counters.clear()

    # Tracing alone: what a backend makes of the graph is not the head's business.
    (model.model if what == "backbone" else model).compile(backend="eager")

    graphs = set()
    for batch, loss, gradient in zip(batches, losses, expected, strict=True):
        assert_like_formula(model, loss, gradient, batch)
        graphs.add(counters["stats"]["unique_graphs"])
    # The number of labels is no part of what is traced.
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_labels_that_the_forward_changes_in_place_are_scored_as_changed(batch: Batch) -> None:
    class Changing(type(tiny_model("llama"))):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
            if labels is not None:
                labels.masked_fill_(input_ids < 60, -100)
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)

    model = tiny_model("llama")
    model.__class__ = Changing
    inputs = {"input_ids": batch["input_ids"]}
    expected = model(**inputs, labels=batch["input_ids"].clone()).loss
    add_gated_head(model, "nll")
    assert model(**inputs, labels=batch["input_ids"].clone()).loss.item() == pytest.approx(
        expected.item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.zeros(10, dtype=torch.long),
            r"labels must be \(batch, sequence\); their shape is \(10,\)",
        ),
        (
            torch.zeros(2, 9, dtype=torch.long),
            r"labels must have input_ids' shape, \(2, 10\); their shape is \(2, 9\)",
        ),
        (torch.zeros(1, 10, dtype=torch.long), r"labels must have input_ids' shape"),
        (torch.tensor(1), r"labels must be \(batch, sequence\)"),
        ([[1] * 10] * 2, "labels must be a tensor of integers, not list"),
        (torch.zeros(2, 10), "labels must be integers"),
    ],
    ids=["1-D", "short", "one row", "0-D", "list", "float"],
)
def test_labels_of_another_shape_are_named(
    model: PreTrainedModel, labels: Any, message: str
) -> None:
    add_gated_head(model)
    ids = torch.ones(2, 10, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, labels=labels)


def test_bytes_are_labels_too(model: PreTrainedModel) -> None:
    add_gated_head(model)
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(
        model(input_ids=ids, labels=ids.byte()).loss, model(input_ids=ids, labels=ids).loss
    )


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
