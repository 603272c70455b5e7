"""The public fused losses over a language model's head, and what each of them needs.

Calls were read in PyTorch 2.14, TRL 1.16, liger-kernel 0.8.5, cut-cross-entropy 25.1.1 and quack-kernels 0.6.5. Packages are
imported when a loss is built, since each needs others and most need a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .contestant import BLACKWELL, HOPPER, Contestant, Loss, Needs, UnavailableError
from .job import IGNORED

HALF = ("bfloat16", "float16")


def _torch_cross_entropy() -> Loss:
    return lambda hidden, weight, targets: functional.cross_entropy(
        (hidden @ weight.T).float(), targets
    )


def _torch_linear_cross_entropy() -> Loss:
    if not hasattr(functional, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: functional.linear_cross_entropy(
        hidden, weight, targets, options=options
    )


def _trl() -> Loss:
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.kernels.chunked_logprob import _use_triton
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError:
        raise UnavailableError("this TRL has no fused LM head (1.15 and later have)") from None
    # TRL's own call for a model without softcap or scale: temperature, chunk, softcap, scale, outputs.
    options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # As TRL does: masked labels are left out where Triton runs, scored and dropped elsewhere.
        mask = targets != IGNORED
        compact = _use_triton(hidden.device)
        rows = hidden[mask] if compact else hidden
        labels = targets[mask] if compact else targets.clamp(min=0)
        log_probs = ChunkedLogProbFunction.apply(rows, weight, None, labels, *options)[0]
        if not compact:
            log_probs = log_probs.masked_fill(~mask, 0)
        return -log_probs.sum() / mask.sum().clamp(min=1)

    return loss


def _liger(use_token_scaling: bool) -> Contestant:
    """What Liger's patched models call: Triton's kernel between torch's products."""

    def build() -> Loss:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        module = LigerFusedLinearCrossEntropyLoss(use_token_scaling=use_token_scaling)
        return lambda hidden, weight, targets: module(weight, hidden, targets)

    needs = Needs(("liger_kernel",), gpu=True)
    return Contestant("dft" if use_token_scaling else "nll", build, needs)


def _liger_cute_cross_entropy() -> Loss:
    """Torch's products with a CuTe kernel in between, which is what Liger's dispatcher picks from Hopper on."""
    from liger_kernel.functional import fused_linear_cross_entropy

    return lambda hidden, weight, targets: fused_linear_cross_entropy(
        hidden, weight, targets, impl="nvidia-cutedsl"
    )[0]


def _liger_hopper() -> Loss:
    """Products and cross-entropy in CuTe; nothing else in Liger calls it."""
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
        LigerFusedLinearCrossEntropySM90Function,
    )

    return lambda hidden, weight, targets: LigerFusedLinearCrossEntropySM90Function.apply(
        hidden, weight, targets, IGNORED, "mean"
    )


def _liger_blackwell() -> Loss:
    """What LIGER_KERNEL_IMPL=cutedsl puts in the place of Liger's function.

    Called by itself: in 0.8.5 `LigerFusedLinearCrossEntropyLoss` hands it two arguments too many.
    """
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction,
    )

    return lambda hidden, weight, targets: LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets
    )[0]


def _liger_scaled() -> Loss:
    """Losses of tokens, by a CuTe kernel on Hopper (elsewhere by PyTorch in chunks); their mean is taken here."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        token_loss = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)
        return token_loss.sum() / (targets != IGNORED).sum().clamp(min=1)

    return loss


def _cut_cross_entropy(implementation: str, **options: object) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(
        hidden, weight, targets, impl=implementation, **options
    )


def _quack(use_scaled_exp: bool) -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, targets: chunked_linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORED, use_scaled_exp=use_scaled_exp
    )


_CUTE = ("liger_kernel", "cutlass")

PUBLIC_LOSSES = {
    "torch cross_entropy": Contestant("nll", _torch_cross_entropy),
    "torch linear_cross_entropy": Contestant("nll", _torch_linear_cross_entropy),
    "TRL fused LM head": Contestant("nll", _trl, Needs(("trl",))),
    "Liger FLCE, Triton": _liger(use_token_scaling=False),
    "Liger FLCE, token scaling": _liger(use_token_scaling=True),
    "Liger FLCE, CuTe CE": Contestant(
        "nll",
        _liger_cute_cross_entropy,
        # Another vocabulary would silently be Triton's.
        Needs(_CUTE, least_capability=HOPPER, vocab_multiple=8),
    ),
    "Liger FLCE, CuTe SM90": Contestant(
        "nll",
        _liger_hopper,
        Needs(
            _CUTE,
            capability=HOPPER,
            dtypes=("bfloat16",),
            tokens_multiple=128,
            vocab_multiple=256,
        ),
        remark="forms the hidden states' gradient in evaluation too, the weight's also where it is frozen",
    ),
    "Liger FLCE, CuTe SM100": Contestant(
        "nll",
        _liger_blackwell,
        Needs(_CUTE, capability=BLACKWELL, dtypes=HALF),
        remark="forms both gradients even where one is frozen, and in evaluation of a trainable head",
    ),
    "Liger scaled CE, CuTe SM90": Contestant(
        "nll",
        _liger_scaled,
        Needs(_CUTE, capability=HOPPER, dtypes=("bfloat16",)),
        remark="sums the weight's gradient in bfloat16",
    ),
    "cut-cross-entropy": Contestant(
        "nll",
        lambda: _cut_cross_entropy("cce"),
        Needs(("cut_cross_entropy",), gpu=True, dtypes=HALF),
        remark="leaves out what is below the dtype's epsilon / 32, as it does by default (filter_eps='high')",
    ),
    # 25.1.1 has no cce_exact; this is what it has of it.
    "cut-cross-entropy, unfiltered": Contestant(
        "nll",
        lambda: _cut_cross_entropy("cce", filter_eps=None),
        Needs(("cut_cross_entropy",), gpu=True, dtypes=HALF),
        remark="the whole gradient (filter_eps=None)",
    ),
    "cut-cross-entropy, compiled": Contestant(
        "nll",
        lambda: _cut_cross_entropy("torch_compile"),
        Needs(("cut_cross_entropy",)),
        remark="torch.compile of full logits (impl='torch_compile'), its only path on a CPU",
    ),
    "QuACK chunked": Contestant(
        "nll",
        lambda: _quack(use_scaled_exp=False),
        Needs(
            ("quack",),
            least_capability=HOPPER,
            dtypes=HALF,
            tokens_multiple=8,
            vocab_multiple=8,
            hidden_multiple=8,
        ),
    ),
    "QuACK scaled exp": Contestant(
        "nll",
        lambda: _quack(use_scaled_exp=True),
        Needs(
            ("quack",),
            capability=HOPPER,
            dtypes=("bfloat16",),
            vocab_multiple=128,
            hidden_multiple=8,
        ),
    ),
}
