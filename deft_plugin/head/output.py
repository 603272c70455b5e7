"""What a gated forward returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from ..ops import GatedLoss


@dataclass
class GatedCausalLMOutput(ModelOutput):
    """A loss and what the gates did, in place of logits.

    Per-token tensors have shape (batch, sequence - 1), or (batch, sequence) with `shift_labels`, and are 0
    where the label is -100. Dtype float32, or float64 for a float64 model.

    Args:
        loss: scalar, differentiable; with the auxiliary loss of a mixture of experts added as the model's
            own forward does.
        token_loss: differentiable per-token losses.
        label_mask: bool; which positions count.
        log_p, gate, focus, entropy, is_top1: as in `deft_plugin.GatedLoss`, detached.
        aux_loss: load-balancing loss of a mixture of experts, where router logits are asked for.
        hidden_states, attentions: the backbone's, where asked for.
    """

    loss: Tensor | None = None
    token_loss: Tensor | None = None
    label_mask: Tensor | None = None
    log_p: Tensor | None = None
    gate: Tensor | None = None
    focus: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, loss: Tensor, gated: GatedLoss, own: Any) -> GatedCausalLMOutput:
        """The output of a loss (), what the gates did, and the model's own output."""
        return cls(
            loss=loss,
            token_loss=gated.token_loss,
            label_mask=gated.mask,
            log_p=gated.log_p,
            gate=gated.gate,
            focus=gated.focus,
            entropy=gated.entropy,
            is_top1=gated.is_top1,
            aux_loss=getattr(own, "aux_loss", None),
            hidden_states=getattr(own, "hidden_states", None),
            attentions=getattr(own, "attentions", None),
        )

    def __getattr__(self, name: str) -> Any:
        if name == "logits":
            raise AttributeError(
                "A gated forward builds no logits. Call the model without labels for them, or take the head off: "
                "deft_plugin.gated_head_of(model).remove()."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
