"""Which ids a model has an embedding and a logit for, and whether its tokenizer keeps to them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..head.lm_head import lm_head_of, lm_head_rows

# Labels that are not scored.
IGNORED = -100
REMEDY = (
    "Load the tokenizer that belongs to the model, or call "
    "model.resize_token_embeddings(len(tokenizer))."
)


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer itself, out of a multi-modal model's processor."""
    return getattr(processing_class, "tokenizer", processing_class)


def check_has_tokens(tokenizer: Any) -> None:
    """Raise `ValueError` for a tokenizer that has no tokens but special ones."""
    # What transformers makes of a folder without a tokenizer's files.
    if isinstance(tokenizer, PreTrainedTokenizerBase) and len(tokenizer) <= len(
        {*tokenizer.all_special_ids}
    ):
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, and none but special ones: the model's folder lacks the tokenizer's "
            "files, or they are of another model. Save it there: tokenizer.save_pretrained(FOLDER)."
        )


def check_tokenizer(processing_class: Any, model: PreTrainedModel) -> None:
    """Raise `ValueError` for a tokenizer without tokens, or one that pads with a token that the model has no embedding for."""
    tokenizer = tokenizer_of(processing_class)
    check_has_tokens(tokenizer)
    token = getattr(tokenizer, "pad_token_id", None)
    size = vocabulary_sizes(model)["input_ids"]
    if token is not None and token >= size:
        raise ValueError(
            f"The tokenizer pads with token {token:,}, outside the model's vocabulary [0, {size:,}). {REMEDY}"
        )


def vocabulary_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Number of ids that the model has an embedding for and a logit for, by the column that holds them."""
    # Attributes, since ZeRO-3 leaves no weight to measure.
    default = model.config.get_text_config().vocab_size
    return {
        "input_ids": getattr(model.get_input_embeddings(), "num_embeddings", default),
        "labels": lm_head_rows(lm_head_of(model)),
    }
