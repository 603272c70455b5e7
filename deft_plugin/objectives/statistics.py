"""What an objective may know of a token: a handful of numbers, never the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

OPTIONAL_STATISTICS = ("collision", "entropy", "top_k_entropy")


class MissingStatisticError(AttributeError):
    """An objective read a statistic that it had not asked for."""


@dataclass(frozen=True, repr=False, eq=False)
class TokenStatistics:
    """Detached statistics of N target tokens under the model's distribution p = softmax(logits).

    Every tensor has shape (N,) and dtype float32, or float64 when the hidden states are float64.

    Args:
        log_p: log-probability of the target token, in nats, <= 0.
        vocab_size: number of logits per token, V.
        is_top1: bool; whether the target has the largest logit (ties count as a hit).
        collision: C2 = sum_v p_v^2, the probability that two draws from p agree, in [1/V, 1].
            Minus its logarithm is the Renyi entropy of order 2.
        entropy: Shannon entropy -sum_v p_v log p_v, in nats, in [0, log V].
        top_k_entropy: Shannon entropy of p restricted to its k largest entries and renormalised, in
            nats, in [0, log k].

    The last three are computed only for an objective that lists them in `needs`; reading one that
    was not asked for raises `MissingStatisticError`.
    """

    log_p: Tensor
    vocab_size: int
    is_top1: Tensor | None = None
    collision: Tensor | None = None
    entropy: Tensor | None = None
    top_k_entropy: Tensor | None = None

    @property
    def p(self) -> Tensor:
        """Probability of the target token, in [0, 1]."""
        return self.log_p.exp()

    def tensors(self) -> tuple[Tensor | None, ...]:
        """log_p, is_top1 and the optional ones, None for what was not computed; `of_tensors` takes them back."""
        # Read past the guard below.
        return tuple(self.__dict__[name] for name in ("log_p", "is_top1", *OPTIONAL_STATISTICS))

    @classmethod
    def of_tensors(cls, vocab_size: int, *tensors: Any) -> TokenStatistics:
        """Statistics from what `tensors` gives."""
        return cls(tensors[0], vocab_size, *tensors[1:])

    def clone(self) -> TokenStatistics:
        """A detached copy that shares no memory."""
        # Read past the guard below: a statistic that was not asked for stays None.
        copies: dict[str, Any] = {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
        }
        return TokenStatistics(**copies)

    def __getattribute__(self, name: str):  # type: ignore[no-untyped-def]
        value = object.__getattribute__(self, name)
        if value is None and name in OPTIONAL_STATISTICS:
            raise MissingStatisticError(
                f"The objective reads `statistics.{name}`, which was not computed. Name it when you "
                f'define the objective: needs=("{name}",).'
            )
        return value
