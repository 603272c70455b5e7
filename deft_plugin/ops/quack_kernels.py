"""QuACK's matrix products for Hopper and Blackwell, with an epilogue that leaves exponentials in place of logits.

A product works on blocks of its result: some rows and `width` columns. While a block z of logits is still in registers:

    k    = round(log2(e) max z)          an integer for each row of the block
    e_v  = 2^(log2(e) z_v - k)           at most sqrt(2); stored in bfloat16
    sums of e_v, of e_v^2, of e_v log2(e_v); max z; the target's z_y: in float32, from what was never rounded

so no logit is ever written. Since k is an integer, another block's reference is reached by a power of two, which loses
nothing in bfloat16. On Hopper QuACK's products of the gradients take that power along: a strip, one factor for each row
and 64 columns, is multiplied into the exponentials on their way into the tensor cores.

Source: `quack.linear_cross_entropy` of QuACK 0.6 (Dao et al.), whose private names are used here; its own epilogue has
neither the squares nor the entropy's sums nor the maxima. Nothing here can run without a GPU; all of it compiles without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import quack.cache
import torch
from quack.cute_dsl_utils import get_device_capacity
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.library import identity_epi
from quack.epilogue.math import F2, pexp2
from quack.epilogue.ops import ColVecLoad, ColVecReduce, ColVecSelect
from quack.epilogue.scaled_exp import LOG2E, MaxLog2
from quack.linear_cross_entropy import _lce_dw_scale, _lce_dx_scale
from quack.operand_transform.host import transform_a_operand
from torch import Tensor

from .quack_sums import STRIP_COLUMNS, Partials
from .sums import StatisticsRequest
from .triton_fold import current_device

# QuACK keeps what it has compiled on disk, and of an installed epilogue it would know no more than the name.
quack.cache.EXTRA_SOURCE_DIRS.append(Path(__file__).parent)

HOPPER = 9
# Rows of a block, which two neighbours share the columns' operand for; on Blackwell they are one block of 256.
ROWS = 128
CLUSTER = 2
# The widest block whose epilogue can run beside the next block's product, as QuACK has measured on Hopper.
WIDEST_PINGPONG = 208


class _Maximum(MaxLog2):
    """Writes out the maximum itself, beside the exponent that QuACK makes of it."""

    def stat_value(self, total: Any, group_cols: int) -> Any:
        return total


def _largest(acc: Any) -> dict[str, Any]:
    return {"exponent": acc}


def _multiply_add(value: Any, factor: Any, addend: Any) -> Any:
    """Rounded once: on Blackwell values come in pairs, whose two operations no compiler joins."""
    if isinstance(value, F2):
        return value.fma(factor, addend)
    return value * factor + addend


def _epilogue(collision: bool, entropy: bool) -> Any:
    """The epilogue with the sums that are asked for, each of them one multiply-add a logit."""
    exponent, target = MaxLog2("exponent"), ColVecLoad("target")
    sums = {"powers": ColVecReduce("powers")}
    if collision:
        sums["squares"] = ColVecReduce("squares", scaled=True)
    if entropy:
        sums["weighted"] = ColVecReduce("weighted", scaled=True)

    def exponentials_and_sums(acc: Any, exponent: Any) -> dict[str, Any]:
        difference = _multiply_add(acc, LOG2E, -exponent)
        power = pexp2(difference)
        results = {"D": power, "powers": power, "target_logit": acc}
        if collision:
            results["squares"] = (power, power)
        if entropy:
            results["weighted"] = (power, difference)
        return results

    return gemm_epilogue(
        ops={"exponent": exponent},
        prepass=_largest,
        prepass_outs=("exponent",),
        reduces=sums,
        outs={"target_logit": ColVecSelect("target_logit", idx_op=target)},
        extra_ops=(exponent.out("exponents"), _Maximum("exponent").out("maxima"), target),
    )(exponentials_and_sums)


_EPILOGUES = {
    (collision, entropy): _epilogue(collision, entropy)
    for collision in (False, True)
    for entropy in (False, True)
}


def takes_strips(device: torch.device) -> bool:
    """Whether `project_back_` and `add_outer_` run there: on Hopper, but not on Blackwell in QuACK 0.6."""
    return bool(get_device_capacity(device)[0] == HOPPER)


def exponentials(
    powers: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    width: int,
    request: StatisticsRequest,
) -> Partials:
    """Exponentials of hidden @ weight.T, and what is known of each row's blocks.

    Args:
        powers: (n, V), bfloat16, rows contiguous; overwritten. None stores none, for an evaluation.
        hidden: (n, H), bfloat16, contiguous; H a multiple of 8.
        weight: (V, H), bfloat16, contiguous.
        targets: (n,), int64; rows with one outside [0, V) get no `target_logit`.
        width: of a block, a divisor of V and a multiple of 64.
        request: which sums to form.
    """
    count, blocks = hidden.size(0), weight.size(0) // width

    def partial() -> Tensor:
        return torch.empty(count, blocks, dtype=torch.float32, device=hidden.device)

    partials = Partials(
        exponents=partial(),
        maxima=partial(),
        powers=partial(),
        squares=partial() if request.collision else None,
        weighted=partial() if request.entropy else None,
        target_logit=torch.empty(count, dtype=torch.float32, device=hidden.device),
    )
    outputs = {name: value for name, value in partials._asdict().items() if value is not None}
    on_hopper = takes_strips(hidden.device)
    with current_device(hidden.device):
        _EPILOGUES[request.collision, request.entropy].gemm(
            hidden,
            weight,
            powers,
            epi_args={"exponent": width, "target": targets, **outputs},
            tile_M=ROWS if on_hopper else CLUSTER * ROWS,
            tile_N=width,
            cluster_M=CLUSTER,
            cluster_N=1,
            pingpong=on_hopper and width <= WIDEST_PINGPONG,
        )
    return partials


def project_back_(gradient: Tensor, powers: Tensor, strips: Tensor, weight: Tensor) -> None:
    """gradient = (strips * powers) @ weight.

    Args:
        gradient: (n, H), bfloat16, contiguous; overwritten.
        powers: (n, V), bfloat16; n a multiple of 128.
        strips: (V / 64, n), bfloat16, contiguous; a power of two for each row and 64 columns of it.
        weight: (V, H), bfloat16, contiguous.
    """
    _multiply(_lce_dx_scale, powers, strips, weight, gradient, cluster=(CLUSTER, 1))


def add_outer_(gradient: Tensor, keep: int, powers: Tensor, strips: Tensor, hidden: Tensor) -> None:
    """gradient = keep * gradient + (strips * powers).T @ hidden, in the gradient's precision.

    Args:
        gradient: (V, H), float32, or bfloat16 with keep = 0, contiguous.
        keep: 0, where the gradient may hold anything, or 1.
        powers, strips: as in `project_back_`; V a multiple of 128.
        hidden: (n, H), bfloat16, contiguous.
    """
    _multiply(_lce_dw_scale, powers.t(), strips, hidden, gradient, cluster=(1, CLUSTER), keep=keep)


def _multiply(
    scaling: Any,
    left: Tensor,
    strips: Tensor,
    right: Tensor,
    result: Tensor,
    cluster: tuple[int, int],
    keep: int = 0,
) -> None:
    """result = keep * result + scaling(left, strips) @ right; what is kept is added to in memory, not read."""
    with current_device(left.device):
        identity_epi.gemm(
            transform_a_operand(scaling, left, {"u": strips}, ROWS, STRIP_COLUMNS),
            right.mT,
            result,
            epi_args={},
            transform_a=scaling,
            add_to_output=bool(keep),
            tile_M=ROWS,
            tile_N=192 if right.size(1) % 192 == 0 else 256,
            tile_K=STRIP_COLUMNS,
            cluster_M=cluster[0],
            cluster_N=cluster[1],
        )
