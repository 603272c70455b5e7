"""The fused core: losses of hidden states and an lm_head's weight. Knows objectives; knows no model and no trainer.

Its words, in the order of the computation:

    projection    from the hidden states of n tokens to their logits, (n, V): one product with the lm_head's weight,
                  what is added to it, and the model's scale and softcap
    tile          the logits of as many tokens as fit a buffer, all of the vocabulary; only one is there at a time
    fold          a tile becomes its sums and its error, in place
    sums          six numbers a token, which a fold leaves
    statistics    what an objective is given of a token, from the sums: log p of its target, entropy, ...
    error         p - e_y, (n, V): the gradient of -log p of the target in the logits
    gate          one number a token, of its statistics: an objective's gradient is the gate times the error

To read from the top: `linear` is the call, `plan` what it settles, `token_loss` the computation with its gradients.
`folded_tiles` walks over the `tiles`, each of which `fold` or `triton_fold` folds, or `quack_tiles` has folded already;
`gradients` multiplies their errors into the operands' gradients, without what `skipping` leaves out. `reference` is the
definition that all of it equals, and `logits` the loss of logits that are there already.
"""

from .linear import linear_gated_loss
from .logits import gated_loss
from .output import GatedLoss
from .settings import PATHS, CoreSettings, split_settings
from .targets import CountedTargets

__all__ = [
    "PATHS",
    "CoreSettings",
    "CountedTargets",
    "GatedLoss",
    "gated_loss",
    "linear_gated_loss",
    "split_settings",
]
