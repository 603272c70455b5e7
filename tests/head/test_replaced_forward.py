"""Putting a head on and taking it off; copies, pickles, replicas and files of a model that has one."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, get_peft_model
from transformers import AutoModelForCausalLM, Phi3ForCausalLM, PreTrainedModel

from deft_plugin import GatedCausalLMOutput, add_gated_head, gated_head_of

from ..tiny import tiny_model
from .oracle import Batch, assert_like_formula, formula_loss, gradients, make_batch


@pytest.fixture
def model() -> PreTrainedModel:
    # Llama cannot be pickled with transformers 5.16, head or no head.
    return tiny_model("phi3").double()


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


def saved_by_torch(model: PreTrainedModel) -> PreTrainedModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


copies = pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_by_torch])
Duplicate = Callable[[PreTrainedModel], PreTrainedModel]


def double_weights(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)


@copies
def test_a_copy_runs_its_own_weights(
    model: PreTrainedModel, batch: Batch, duplicate: Duplicate
) -> None:
    head = add_gated_head(model, "deft")
    copied = duplicate(model)
    before = model(**batch).loss

    double_weights(copied)

    copied_head = gated_head_of(copied)
    assert copied_head is not None
    assert copied_head is not head
    output = copied(**batch)
    assert isinstance(output, GatedCausalLMOutput)
    assert torch.equal(model(**batch).loss, before)
    copied_head.remove()
    torch.testing.assert_close(output.loss, formula_loss(copied, batch))
    assert gated_head_of(model) is head


@copies
def test_a_copy_without_labels_runs_its_own_weights(
    model: PreTrainedModel, batch: Batch, duplicate: Duplicate
) -> None:
    add_gated_head(model)
    copied = duplicate(model)
    double_weights(copied)
    logits = copied(input_ids=batch["input_ids"]).logits
    double_weights(model)
    assert torch.equal(logits, model(input_ids=batch["input_ids"]).logits)


def test_a_data_parallel_replica_runs_its_own_weights(model: PreTrainedModel, batch: Batch) -> None:
    add_gated_head(model)
    # What DataParallel makes of the outermost module on each device; its children are replaced.
    replica = model._replicate_for_data_parallel()
    other = tiny_model("phi3", seed=1).double()
    replica._modules = other._modules

    output = replica(**batch)

    torch.testing.assert_close(output.loss, formula_loss(other, batch))


def test_two_models_have_heads_of_their_own(batch: Batch) -> None:
    models = [tiny_model("phi3", seed=seed).double() for seed in range(2)]
    names = ["deft", "nll"]
    expected = [formula_loss(model, batch, name) for model, name in zip(models, names, strict=True)]

    for model, name in zip(models, names, strict=True):
        add_gated_head(model, name)

    for model, loss in zip(models, expected, strict=True):
        torch.testing.assert_close(model(**batch).loss, loss)


def test_remove_leaves_no_trace(model: PreTrainedModel, batch: Batch) -> None:
    before, keys = dict(vars(model)), list(model.state_dict())
    own = model(**batch)

    head = add_gated_head(model)
    assert list(model.state_dict()) == keys
    head.remove()

    assert type(model) is Phi3ForCausalLM
    assert vars(model) == before
    assert torch.equal(model(**batch).logits, own.logits)
    assert gated_head_of(model) is None
    with pytest.raises(RuntimeError, match="not on its model any more"):
        head.remove()


def test_a_forward_on_the_instance_is_the_models_own_and_is_given_back(
    model: PreTrainedModel, batch: Batch
) -> None:
    def patched(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        output = Phi3ForCausalLM.forward(self, *args, **{**kwargs, "labels": None})
        output.logits = output.logits / 2
        if kwargs.get("labels") is not None:
            output.loss = self.loss_function(
                logits=output.logits, labels=kwargs["labels"], vocab_size=output.logits.size(-1)
            )
        return output

    forward = types.MethodType(patched, model)
    model.forward = forward
    expected = model(**batch)

    head = add_gated_head(model, "nll")

    without_labels = model(**{**batch, "labels": None})
    torch.testing.assert_close(without_labels.logits, expected.logits)
    actual = model(**batch)
    assert isinstance(actual, GatedCausalLMOutput)
    torch.testing.assert_close(actual.loss, expected.loss, check_dtype=False)
    head.remove()
    assert model.__dict__["forward"] is forward


def test_remove_is_refused_under_a_later_wrapper(model: PreTrainedModel, batch: Batch) -> None:
    head = add_gated_head(model)
    gated = model.forward
    model.forward = lambda *args, **kwargs: gated(*args, **kwargs)

    with pytest.raises(RuntimeError, match="wrapped after the gated head was added"):
        head.remove()

    assert isinstance(model(**batch), GatedCausalLMOutput)
    del model.forward
    head.remove()


def test_a_model_with_a_head_looks_like_itself(model: PreTrainedModel) -> None:
    own = inspect.signature(model.forward)

    add_gated_head(model)

    assert isinstance(model, Phi3ForCausalLM)
    assert repr(type(model)) == repr(Phi3ForCausalLM)
    assert inspect.signature(model.forward) == own
    assert inspect.signature(type(model).forward) == inspect.signature(Phi3ForCausalLM.forward)


def test_a_model_with_a_head_is_saved_and_loaded_as_any_other(
    model: PreTrainedModel, batch: Batch, tmp_path: Path
) -> None:
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)
    add_gated_head(model)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)

    assert type(loaded) is Phi3ForCausalLM
    assert loaded.config.architectures == ["Phi3ForCausalLM"]
    assert gated_head_of(loaded) is None
    add_gated_head(loaded)
    assert_like_formula(loaded, loss, expected, batch)


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
