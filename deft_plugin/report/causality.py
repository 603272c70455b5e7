"""Whether a model predicts each token from those before it alone.

One with attention in both directions, as BERT has it, sees the token that it is to predict: all would look known to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..head import causal_lm_of
from .forward import logits_of
from .rows import Row

# Of few tokens each has a part in all others' attention.
TOKENS = 8
# Of the change at the changed token itself. Trained models of BERT's kind have 0.1 and more, untrained ones 0.002; sums of half
# precision in another order (experts get other tokens together) have 0.01.
LEAST_CHANGE = {torch.float32: 0.001}
LEAST_CHANGE_IN_HALF = 0.03


@torch.inference_mode()
def check_is_causal(model: PreTrainedModel, rows: Sequence[Row]) -> None:
    """Raise `ValueError` where the logits at a position change with a token after it.

    Args:
        model: in evaluation mode.
        rows: of which the longest one's beginning is run, as it is (twice, since some kernels add up in any order) and
            with another last token.
    """
    ids = max((row.input_ids for row in rows), key=len)[:TOKENS]
    other = next((token for token in ids if token != ids[-1]), max(ids[-1] - 1, 0))
    if len(ids) < 2 or other == ids[-1]:
        return
    mask = torch.ones(1, len(ids), dtype=torch.long)
    first, again, changed = (
        logits_of(model, torch.tensor([row]), mask)[0] for row in (ids, ids, [*ids[:-1], other])
    )
    least = LEAST_CHANGE.get(first.dtype, LEAST_CHANGE_IN_HALF)

    def change(of: torch.Tensor, places: slice) -> float:
        return float((of[places] - first[places]).float().abs().nan_to_num(0, 0).mean())

    before, last = slice(0, -1), slice(-1, None)
    if change(changed, before) > 10 * change(again, before) + least * change(changed, last):
        raise ValueError(
            f"{type(causal_lm_of(model)).__name__} is not a causal language model: what it predicts at a position changes with "
            "the tokens after it, so that it sees what it is to predict. Objectives here are of the next token: name a model "
            "with causal attention (of BERT's kind, one with is_decoder=True)."
        )
