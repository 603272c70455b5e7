"""For transformers.Trainer, where the model's logits are built: a `compute_loss_func`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers.utils import is_accelerate_available

from ..objectives import Objective, build_objective
from ..ops import gated_loss


class LogitsLoss:
    """An objective as `Trainer(compute_loss_func=LogitsLoss("deft"))`.

    Takes the model's outputs with logits (batch, sequence, V), named or first, and labels (batch, sequence),
    shifts the labels by one, and divides by `num_items_in_batch`, so that gradients do not depend on how a
    step is split into micro-batches. The logits are the memory's largest tensor: `add_gated_head` avoids them.

    Args:
        objective: a registered name or an `Objective`.
        parameters: the named objective's parameters.

    Raises:
        ValueError: an unknown objective or parameter; when called, outputs with a mixture's auxiliary loss,
            whose coefficient a compute_loss_func does not see, or context parallelism.
    """

    def __init__(self, objective: str | Objective = "deft", **parameters: Any) -> None:
        self.objective = build_objective(objective, parameters)

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: int | Tensor | None = None
    ) -> Tensor:
        if isinstance(outputs, Mapping) and outputs.get("aux_loss") is not None:
            raise ValueError(
                "The model's auxiliary loss would be dropped: a compute_loss_func does not see its coefficient. "
                "Use deft_plugin.add_gated_head(model), which keeps it, or set "
                "model.config.output_router_logits=False to train without it."
            )
        if _cuts_sequences():
            raise ValueError(
                "Under context parallelism a compute_loss_func sees labels that were cut into parts before they are shifted: "
                "the last token of each part would be scored with another part's label. Use "
                "deft_plugin.add_gated_head(model), which takes labels that were shifted before, or set cp_size=1."
            )
        # A tuple with return_dict=False.
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        # Shifting the labels, not the logits, avoids a copy of the logits.
        targets = functional.pad(labels[..., 1:], (0, 1), value=-100).to(logits.device)
        loss = gated_loss(logits, targets, self.objective, num_items_in_batch=num_items_in_batch)
        return loss.loss


def _cuts_sequences() -> bool:
    """Whether transformers.Trainer, by accelerate, has parts of sequences on several ranks."""
    if not is_accelerate_available():
        return False
    from accelerate.state import AcceleratorState

    parallelism = AcceleratorState._shared_state.get("parallelism_config")
    return parallelism is not None and parallelism.cp_size > 1
