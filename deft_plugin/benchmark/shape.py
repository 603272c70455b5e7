"""The size of a model's lm_head, from its configuration."""

from __future__ import annotations

from ..model_config import config_of_model


def shape_of_model(name: str) -> tuple[int, int]:
    """V and H: the logits of a token, and the hidden units that they are made of.

    Args:
        name: a model's folder, or its name on the hub; no weights are loaded.

    Raises:
        ValueError: there is no such model, or its configuration does not say.
    """
    config = config_of_model(name, "MODEL").get_text_config()
    vocab = getattr(config, "vocab_size", None)
    # OPT's embeddings may be narrower than its layers.
    hidden = getattr(config, "word_embed_proj_dim", None) or getattr(config, "hidden_size", None)
    if not isinstance(vocab, int) or not isinstance(hidden, int):
        raise ValueError(
            f"MODEL {name!r}: its configuration, {type(config).__name__}, has no vocab_size or hidden_size. Name them "
            "with --vocab and --hidden."
        )
    return vocab, hidden
