"""A vocabulary spread over ranks: each projects onto its own rows of the lm_head, and scalars travel.

Tensor parallelism shards an lm_head's weight (V, H) by rows. Every rank has the same hidden states and the
same targets, and folds its own columns of a tile of logits. Two small reductions a tile make the
statistics whole, the same on every rank: first the largest logit and the target's, then the sums. Each rank then
holds its own columns of the error, forms its own rows of the weight's gradient, and adds up the hidden states'
with the others, once a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from ..objectives import TokenStatistics
from .softmax import StatisticsRequest, log_probability, sum_of_squares, top_k_entropy


@dataclass(frozen=True)
class VocabularyShard:
    """Which part of the vocabulary this rank has.

    Args:
        group: the ranks that have all of it together.
        first: the token of this rank's first row.
        vocab_size: number of tokens of all ranks, V.
    """

    group: distributed.ProcessGroup
    first: int
    vocab_size: int

    @property
    def largest_size(self) -> int:
        """Most rows that a rank has."""
        return -(-self.vocab_size // distributed.get_world_size(self.group))

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place. Collective."""
        distributed.all_reduce(values, distributed.ReduceOp.SUM, self.group)
        return values

    def max_(self, values: Tensor) -> Tensor:
        """Maximum over the ranks, in place. Collective."""
        distributed.all_reduce(values, distributed.ReduceOp.MAX, self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """(n, k) of every rank side by side, (n, k * ranks). Collective."""
        parts = [torch.empty_like(values) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(parts, values.contiguous(), self.group)
        return torch.cat(parts, dim=1)


def fold_shard_(
    logits: Tensor, targets: Tensor, request: StatisticsRequest, shard: VocabularyShard
) -> tuple[Tensor, Tensor, TokenStatistics]:
    """`fold_logits_` on the columns of one rank: error up to a row factor, the factor, and the statistics.

    Args:
        logits: (n, columns), float32 or float64, contiguous; destroyed. NaN and infinities as in
            `fold_logits_`.
        targets: (n,), int64, in [0, V).
        request: optional statistics to compute.
        shard: whose columns these are. Collective over its group.
    """
    if logits.size(1) == 0:
        # A rank without tokens takes part with one that has probability 0.
        padded = logits.new_full((logits.size(0), 1), -torch.inf)
        _, row_factor, statistics = fold_shard_(padded, targets, request, shard)
        return logits, row_factor, statistics
    columns = targets - shard.first
    is_here = ((columns >= 0) & (columns < logits.size(1))).unsqueeze(1)
    columns = columns.clamp(0, logits.size(1) - 1).unsqueeze(1)
    target_logit = logits.gather(1, columns).masked_fill(~is_here, -torch.inf).squeeze(1)
    largest_logit, target_logit = shard.max_(torch.stack((logits.amax(1), target_logit)))
    top_k = _top_k_entropy(logits, request.top_k, shard) if request.top_k else None

    weights = logits.sub_(largest_logit.unsqueeze(1)).exp_()  # At most 1.
    parts = [sum_of_squares(weights)] if request.collision else []
    parts += [torch.special.entr(weights).sum(1)] if request.entropy else []
    error = weights.scatter_(1, columns, weights.gather(1, columns).masked_fill(is_here, 0.0))
    others, *rest = shard.sum_(torch.stack((error.sum(1), *parts)))
    target_weight = (target_logit - largest_logit).exp()
    total = others + target_weight
    entry = torch.where(is_here, -others.unsqueeze(1), error.gather(1, columns))
    error.scatter_(1, columns, entry)

    log_total = total.log()
    collision = rest.pop(0) / total.square() if request.collision else None
    # Both terms are >= 0.
    entropy = log_total + rest.pop(0) / total if request.entropy else None
    statistics = TokenStatistics(
        log_p=log_probability(others / total, target_logit - largest_logit - log_total),
        vocab_size=shard.vocab_size,
        is_top1=target_logit >= largest_logit,
        collision=collision,
        entropy=entropy,
        top_k_entropy=top_k,
    )
    return error, total.reciprocal(), statistics


def _top_k_entropy(logits: Tensor, k: int, shard: VocabularyShard) -> Tensor:
    """`top_k_entropy` of the whole vocabulary: the k largest are among each rank's k largest."""
    largest = logits.topk(min(k, logits.size(1)), dim=1).values
    missing = min(k, shard.largest_size) - largest.size(1)
    largest = torch.nn.functional.pad(largest, (0, missing), value=-torch.inf)
    return top_k_entropy(shard.gather(largest), k)
