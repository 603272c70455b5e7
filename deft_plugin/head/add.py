"""`add_gated_head`: what it checks, what it makes, and what it installs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from ..objectives import Objective, build_objective
from ..ops import CoreSettings
from .gated_head import GatedHead
from .output import GatedCausalLMOutput
from .refusals import check_model
from .replaced_forward import replacement_on


def add_gated_head(
    model: PreTrainedModel,
    objective: str | Objective = "deft",
    parameters: Mapping[str, Any] | None = None,
    *,
    with_entropy: bool = False,
    path: str = "auto",
    tile_rows: int | None = None,
    skip_below: float = 0.0,
    output_class: type[GatedCausalLMOutput] = GatedCausalLMOutput,
) -> GatedHead:
    """Give a Hugging Face causal LM a gated head, in place.

    From then on `model(..., labels=...)` (or `shift_labels=`) runs the backbone, scores the labelled
    positions with `linear_gated_loss` and returns a `GatedCausalLMOutput`; without labels the forward is the
    original one. A PEFT model's base model is patched, so adapters and prompt tuning work as before.
    Add the head before the model is wrapped for distributed training.

    The model's class becomes a subclass of the same name. Deep copies, pickles and DataParallel replicas of the
    model have the head too.

    Before it installs itself, the head runs the model's own forward on eight tokens with stand-ins for lm_head and
    loss, and measures what it does to logits and labels; a forward that does what is not known here is refused.

    Args:
        model: a `PreTrainedModel` with an lm_head, or a PEFT model of one.
        objective: a registered name or an `Objective`.
        parameters: the named objective's parameters.
        with_entropy: also compute the Shannon entropy of every scored position.
        path, tile_rows, skip_below: as in `linear_gated_loss`.
        output_class: class of the output, for adapters that need other names on it.

    Raises:
        ValueError: a bad objective or parameter; a gated head that is there already; a model without an lm_head, or
            whose lm_head is no linear layer (plain or quantised, with LoRA, trainable tokens or in
            modules_to_save) or has another adapter (DoRA, for one); an encoder-decoder, a masked LM and others
            whose labels are not the next token; NaN in the lm_head; a forward, logits or losses that are not what
            the head takes them for (docs/models.md lists the classes). Where weights are partitioned, sharded or on
            meta, or the forward wants more than tokens, the last is found at the first gated forward.
    """
    objective = build_objective(objective, parameters)
    settings = CoreSettings(path, tile_rows, skip_below)
    outermost, model = model, causal_lm_of(model)
    check_model(model)
    _check_has_none(model)
    head = GatedHead(model, objective, with_entropy, settings, output_class)
    head.compare_with_own_forward()
    head.install(outermost)
    return head


def gated_head_of(model: PreTrainedModel) -> GatedHead | None:
    """The gated head on `model` or on the base model inside a PEFT model; None without one."""
    head: GatedHead | None = replacement_on(causal_lm_of(model))
    return head


def causal_lm_of(model: PreTrainedModel) -> PreTrainedModel:
    """The causal LM itself, out of a PEFT model."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def _check_has_none(model: PreTrainedModel) -> None:
    present = replacement_on(model)
    if present is not None:
        raise ValueError(
            f"The model has a gated head with {present.objective!r} already. Set its `objective`, or "
            "remove() it first."
        )
