"""What the gates did: token-weighted means over a logging window and all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .histograms import SIZE, Histogram, count_up_to, histograms_of, upper_edges
from .ops import GatedLoss

CLOSED_GATE = 0.1
METRICS = {
    "objective_loss": "mean of the objective",
    "nll": "mean negative log-likelihood, in nats",
    "perplexity": "exp(nll)",
    "entropy": "mean Shannon entropy of the model's distribution, in nats",
    "mean_token_accuracy": "share of tokens whose target has the largest logit",
    "mean_target_probability": "mean p of the target",
    "mean_focus": "mean exponent a (objectives of the deformed-log family)",
    "mean_gate": "mean factor on a token's gradient",
    "closed_gate_share": f"share of tokens with a gate below {CLOSED_GATE}",
    "scored_tokens": "tokens that the means are over",
}
# Only with `skip_below`.
SKIPPING_METRICS = {
    "skipped_share": "share of the gradients' products, tokens times vocabulary, that was left out",
}
_LOWER_IS_BETTER = ("nll", "perplexity")
# Of an evaluation's metrics, what transformers and TRL add to these.
_OTHERS_METRICS = (
    "loss",
    "aux_loss",
    "num_tokens",
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "model_preparation_time",
)
# Of one forward pass, besides the histograms' counts.
_SUMS = 14


def is_best_smallest(metric: str | None) -> bool:
    """Whether a `metric_for_best_model` is one of these whose smallest value is the best.

    transformers takes every metric whose name does not end in "loss" for a score.
    """
    return (metric or "").rpartition("_")[2] in _LOWER_IS_BETTER


def is_of_evaluations(
    metric: str | None, data_sets: Iterable[str] = (), more: Iterable[str] = ()
) -> bool:
    """Whether evaluations have a `metric_for_best_model`, if no code of the user's own adds metrics.

    Args:
        metric: with or without "eval_"; None is transformers' default, the loss.
        data_sets: names of the data sets to evaluate on, where they come in a dict, which metrics then begin with.
        more: metrics that the trainer adds.
    """
    name = (metric or "loss").removeprefix("eval_")
    known = (*METRICS, *SKIPPING_METRICS, *_OTHERS_METRICS, *more)
    prefixes = [f"{data_set}_" for data_set in data_sets] or [""]
    of_sets = [name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)]
    # Of memory transformers has metrics of many names.
    return any(each in known or each.startswith("mem_") for each in of_sets)


class TokenMetrics:
    """Sums over tokens since the last `reset`. Adding a micro-batch does not synchronise the device.

    Args:
        histograms: whether to count tokens for them too.

    Attributes:
        troubles: sentences on what was wrong with the window that `means` was last called for.
        histograms: of that window on all ranks, by name; without those that it has no token for.
    """

    def __init__(self, histograms: bool = False) -> None:
        self.troubles: list[str] = []
        self.histograms: dict[str, Histogram] = {}
        self._edges = upper_edges() if histograms else None
        self._sums: Tensor | None = None
        self._has_focus = True
        self._has_entropy = True

    def reset(self) -> None:
        """Start a new window."""
        self._sums = None

    def add(self, gated: GatedLoss, rows: int | None = None) -> None:
        """Add the tokens of one forward pass, or of its first `rows` rows alone."""
        if rows == 0:
            return  # Not a pass that scored no token, of which the log tells.
        # No float64 on Apple's GPUs. float32 sums of sums over a window are good to six digits.
        dtype = torch.float32 if gated.log_p.device.type == "mps" else torch.float64
        self._has_focus = gated.focus is not None
        self._has_entropy = gated.entropy is not None
        mask = gated.mask
        absent = gated.log_p.new_zeros(1)
        sums = torch.stack(
            [
                value.detach()[:rows].sum(dtype=dtype)
                for value in (
                    mask,
                    gated.token_loss,
                    -gated.log_p,
                    absent if gated.entropy is None else gated.entropy,
                    gated.is_top1,
                    gated.log_p.exp() * mask,
                    absent if gated.focus is None else gated.focus,
                    gated.gate,
                    (gated.gate < CLOSED_GATE) & mask,
                    absent if gated.skipped is None else gated.skipped,
                    absent if gated.skipped is None else mask,
                    ~gated.token_loss.isfinite(),
                    gated.mask.new_ones(1),
                    ~mask[:rows].any().reshape(1),
                )
            ]
        )
        if self._edges is not None:
            # On the device from the first pass on.
            self._edges = self._edges.to(gated.log_p)
            sums = torch.cat((sums, count_up_to(self._edges, gated, rows, dtype)))
        self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)

    def means(
        self, device: torch.device | str = "cpu", *, of_parts: bool = False, copies: int = 1
    ) -> dict[str, float]:
        """Means over the window on all ranks, by the names in `METRICS` and `SKIPPING_METRICS`; {} without any token.

        Collective when torch.distributed is initialised: every rank has to call it.

        Args:
            device: for the sums over ranks.
            of_parts: whether forward passes were of parts of sequences, some of which have no token to score.
            copies: how many ranks have added each token.
        """
        size = _SUMS if self._edges is None else _SUMS + SIZE
        sums = torch.zeros(size, dtype=torch.float64) if self._sums is None else self._sums
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sums = sums.to(device)
            torch.distributed.all_reduce(sums)
            sums /= copies
        values = sums.tolist()
        count, *totals, not_finite, passes, empty_passes = values[:_SUMS]
        self.histograms = histograms_of(values[_SUMS:])
        self.troubles = []
        if not_finite:
            self.troubles.append(
                f"{not_finite:,.0f} of {count:,.0f} scored tokens have no finite loss"
            )
        if empty_passes and not of_parts:
            self.troubles.append(
                f"{empty_passes:,.0f} of {passes:,.0f} forward passes scored no token"
            )
        if not count:
            return {}
        *totals, skipped, multiplied = totals
        loss, nll, entropy, top1, probability, focus, gate, closed = (
            total / count for total in totals
        )
        means = {
            "objective_loss": loss,
            "nll": nll,
            # exp overflows a float at 709.8; a perplexity that large is infinite to any reader.
            "perplexity": math.exp(nll) if nll < 700 else nll if math.isnan(nll) else math.inf,
            "entropy": entropy,
            "mean_token_accuracy": top1,
            "mean_target_probability": probability,
            "mean_focus": focus,
            "mean_gate": gate,
            "closed_gate_share": closed,
            "scored_tokens": round(count),
        }
        # Of the passes that had gradients.
        if multiplied:
            means["skipped_share"] = skipped / multiplied
        if not self._has_focus:
            del means["mean_focus"]
        if not self._has_entropy:
            del means["entropy"]
        return means
