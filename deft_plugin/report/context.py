"""How long a row may be for a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from .rows import Row


def check_context(model: PreTrainedModel, rows: Sequence[Row]) -> None:
    """Raise `ValueError` where a row has more tokens than the model has learned positions.

    Its forward would look up a position that is not there, which on a GPU ends the process.
    """
    most = learned_positions(model)
    if most is None:
        return
    longer = [len(row.input_ids) for row in rows if len(row.input_ids) > most]
    if longer:
        raise ValueError(
            f"{len(longer):,} of the {len(rows):,} rows are longer (up to {max(longer):,} tokens) than the {most:,} positions "
            f"that the model has learned: --max-length {most}, or less."
        )


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions the model has an embedding for; None where they are not learned."""
    tokens = model.get_input_embeddings()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        is_of_positions = isinstance(module, nn.Embedding) and ("pos" in last or last == "wpe")
        if is_of_positions and module is not tokens:
            # OPT's have an offset, RoBERTa's begin after the padding token.
            begin = getattr(module, "offset", None)
            if begin is None:
                begin = 0 if module.padding_idx is None else module.padding_idx + 1
            return int(module.num_embeddings - begin)
    return None


def note_on_context(model: PreTrainedModel, rows: Sequence[Row], label: str) -> str | None:
    """What to say of rows that are longer than what a model without learned positions was made for."""
    most = positions_made_for(model)
    longer = [row for row in rows if most is not None and len(row.input_ids) > most]
    if not longer:
        return None
    return (
        f"{len(longer):,} of the {len(rows):,} rows are longer than the {most:,} positions that {label} was made for "
        f"(max_position_embeddings); what it makes of their ends says little. Shorter: --max-length {most}."
    )


def positions_made_for(model: PreTrainedModel) -> int | None:
    """What the model's configuration says; None where it does not."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # XLNet, which has no limit, says -1.
    return most if isinstance(most, int) and most > 0 else None
