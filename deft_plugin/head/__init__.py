"""The gated head: a Hugging Face causal LM's forward with labels returns an objective's loss, never logits.

head = add_gated_head(model, "deft")
output = model(input_ids=..., labels=...)        # output.loss, output.gate, ...; no logits
model.generate(...)                              # without labels the model is unchanged
head.remove()

To read from the top:

    add               the story: what `add_gated_head` checks, makes and installs
    refusals          what cannot have a head
    gated_head        the head: what a forward with labels does; what it returns is in `output`
    comparison        the check against the model's own forward, before anything is installed
    replaced_forward  how a forward is replaced, and given back

    own_forward       the model's own forward, run with stand-ins in it (`stand_ins`) and scored on its `labels`
    measurement       what that forward does to its logits, found out with known numbers
    own_loss          what its own loss is, and of a mixture of experts the `auxiliary_loss`

    lm_head           which layer makes the logits
    taken_apart       its tensors, whole, whatever has been put on it: a `projection` for the core
    adapters          LoRA and trainable tokens on it
    quantised_weight  its weight where that is quantised
    sharding          which rows of it are on this rank

`substitution`, `configuration` and `cpu_weights` are tools.
"""

from .add import add_gated_head, causal_lm_of, gated_head_of
from .cpu_weights import keep_cpu_weights_unpacked
from .gated_head import GatedHead
from .output import GatedCausalLMOutput
from .refusals import check_model

__all__ = [
    "GatedCausalLMOutput",
    "GatedHead",
    "add_gated_head",
    "causal_lm_of",
    "check_model",
    "gated_head_of",
    "keep_cpu_weights_unpacked",
]
