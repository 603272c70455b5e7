"""The gated head on every architecture: the formula's loss and gradients, without any logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deft_plugin import add_gated_head

from ..tiny import ARCHITECTURES, tiny_model
from .oracle import (
    assert_like_formula,
    formula_loss,
    gradients,
    make_batch,
    without_labels,
)

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@architectures
def test_loss_and_all_gradients_equal_the_formula_on_the_models_own_logits(
    architecture: str, tied: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model = tiny_model(architecture, tie_word_embeddings=tied).to(dtype)
    batch = make_batch()
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)

    add_gated_head(model, "deft")

    assert_like_formula(model, loss, expected, batch, tolerance)


@architectures
def test_nll_equals_the_models_own_loss(architecture: str) -> None:
    model = tiny_model(architecture).double()
    batch = make_batch()
    own = model(**batch)

    add_gated_head(model, "nll")
    output = model(**batch)

    # Own losses are computed in float32.
    torch.testing.assert_close(output.loss.float(), own.loss.float(), rtol=1e-6, atol=0)
    if "aux_loss" in own:
        torch.testing.assert_close(output.aux_loss, own.aux_loss, rtol=0, atol=0)


@architectures
def test_without_labels_the_output_is_the_models_own(architecture: str) -> None:
    # Mixtures cannot generate padded prompts with their router logits.
    model = tiny_model(architecture, output_router_logits=False).eval()
    batch = without_labels(make_batch())
    own = model(**batch)
    own_text = model.generate(**batch, max_new_tokens=5, do_sample=False)

    add_gated_head(model)

    output = model(**batch)
    assert type(output) is type(own)
    assert torch.equal(output.logits, own.logits)
    assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), own_text)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("frozen_head", [False, True], ids=["trainable head", "frozen head"])
@architectures
def test_logits_are_never_built(
    architecture: str, frozen_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab_size = 1024
    model = tiny_model(architecture, vocab_size=vocab_size)
    add_gated_head(model, "deft", tile_rows=8)
    lm_head = model.get_output_embeddings()
    lm_head.requires_grad_(not frozen_head)

    def fail(*args: Any) -> None:
        raise AssertionError("lm_head was called")

    monkeypatch.setattr(lm_head, "forward", fail)
    batch = make_batch(rows=8, length=32)
    scored = int((batch["labels"][:, 1:] != -100).sum())

    with LargestTensor() as recorder:
        model(**batch).loss.backward()

    # Something far larger than a tile of logits has been seen, or the recorder is blind.
    assert recorder.largest >= 8 * vocab_size
    assert recorder.largest < scored * vocab_size / 4


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_auxiliary_loss_is_kept_where_it_is_asked_for(architecture: str) -> None:
    model = tiny_model(architecture, output_router_logits=False)
    batch = make_batch()
    add_gated_head(model)

    plain = model(**batch)
    asked = model(**batch, output_router_logits=True)
    # Where the model's own forward reads it.
    model.router_aux_loss_coef = 0.5
    raised = model(**batch, output_router_logits=True)

    assert plain.aux_loss is None
    torch.testing.assert_close(asked.loss, plain.loss + 0.3 * asked.aux_loss)
    torch.testing.assert_close(raised.loss, plain.loss + 0.5 * asked.aux_loss)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        pytest.param(
            "falcon_h1",
            {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4},
            marks=pytest.mark.slow,
        ),
        ("hyperclovax", {"logits_scaling": 0.3}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
        ("mamba", {"state_size": 4, "tie_word_embeddings": True}),
        ("phi", {"hidden_dropout": 0.0}),
    ],
)
def test_other_treatments_of_logits_are_known(architecture: str, overrides: dict[str, Any]) -> None:
    """A multiplier on the lm_head, one written as its inverse, Conv1D, a state-space model, a bias."""
    model = tiny_model(architecture, **overrides).double().eval()
    batch = make_batch()
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)

    add_gated_head(model)

    # Mamba rounds its logits to float32.
    assert_like_formula(model, loss, expected, batch, tolerance=1e-6)
