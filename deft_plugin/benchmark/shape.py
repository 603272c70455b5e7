"""The size of a model's lm_head, from its configuration."""

from __future__ import annotations

import textwrap


def shape_of_model(name: str) -> tuple[int, int]:
    """V and H: the logits of a token, and the hidden units that they are made of.

    Args:
        name: a model's folder, or its name on the hub; no weights are loaded.

    Raises:
        ValueError: there is no such model, or its configuration does not say.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"MODEL {name!r} is neither a model's folder nor a model on the hub: "
            f"{textwrap.shorten(str(error), 200)}"
        ) from None
    vocab = getattr(config, "vocab_size", None)
    # OPT's embeddings may be narrower than its layers.
    hidden = getattr(config, "word_embed_proj_dim", None) or getattr(config, "hidden_size", None)
    if not isinstance(vocab, int) or not isinstance(hidden, int):
        raise ValueError(
            f"MODEL {name!r}: its configuration, {type(config).__name__}, has no vocab_size or hidden_size. Name them "
            "with --vocab and --hidden."
        )
    return vocab, hidden
