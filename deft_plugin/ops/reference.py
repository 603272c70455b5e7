"""The definition: full logits, log-softmax, and autograd of the formula. Slow, plain, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives import Objective, TokenStatistics
from .sums import StatisticsRequest


def reference_token_loss(
    logits: Tensor, targets: Tensor, objective: Objective, request: StatisticsRequest
) -> tuple[Tensor, TokenStatistics]:
    """Per-token losses (N,), differentiable in `logits`, and the statistics they were taken from.

    Args:
        logits: (N, V), float32 or float64.
        targets: (N,), int64, in [0, V).
        objective: its loss is differentiated by autograd in log p alone; its gate is not used.
        request: optional statistics to compute.
    """
    log_probabilities = torch.log_softmax(logits, dim=1)
    log_p = log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        statistics = TokenStatistics(
            log_p=log_p.detach(),
            vocab_size=logits.size(1),
            is_top1=logits.gather(1, targets.unsqueeze(1)).squeeze(1) >= logits.amax(1),
            collision=(2 * log_probabilities).logsumexp(1).exp() if request.collision else None,
            entropy=_entropy(log_probabilities) if request.entropy else None,
            top_k_entropy=_entropy(
                logits.topk(min(request.top_k, logits.size(1)), dim=1).values.log_softmax(1)
            )
            if request.top_k
            else None,
        )
    return objective.loss(log_p, statistics.clone()), statistics


def _entropy(log_probabilities: Tensor) -> Tensor:
    return torch.special.entr(log_probabilities.exp()).sum(1)
