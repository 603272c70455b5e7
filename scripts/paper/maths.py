"""Right or wrong in mathematics: answers are compared as mathematics by the library `math-verify`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

# "4.5e33", which is 4.5 times Euler's number times 33 to a reader of LaTeX.
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)")
# Boxes that the library does not see, as "\fbox{5}" and "\boxed {5}".
_OTHER_BOX = re.compile(r"\\(?:(?:fbox|framebox)\s*|boxed\s+)\{")
# `verify` rounds to six decimals, so that below this numbers would be equal that have three digits in common or none.
_SMALL = 1e-3


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer states the reference.

    Args:
        answer: what a model says. What counts is in its last box, else after words like "the answer is", else its last
            number or formula.
        reference: LaTeX or a number, with or without box or dollars; of a whole solution, its last box.
    """
    right = _parse(_reference_text(reference), boxed_match_priority=50)
    answer = _OTHER_BOX.sub(r"\\boxed{", answer)
    # Alone, since boxes that stand close together are read as a set.
    said = _parse(answer[max(answer.rfind("\\boxed{"), 0) :], boxed_match_priority=0)
    if not verify(right, said):
        return False
    value = _number(right)
    if value is None or abs(value) >= _SMALL:
        return True
    said_value = _number(said)
    return said_value is None or math.isclose(value, said_value, rel_tol=_SMALL)


def average_of(right: Sequence[Sequence[bool]]) -> float:
    """The share of right answers: the mean over questions of the mean over a question's samples (average@n)."""
    return sum(sum(samples) / len(samples) for samples in right) / len(right)


def pass_at(k: int, right: Sequence[Sequence[bool]]) -> float:
    """The probability that one of k answers is right (pass@k), estimated without bias from n >= k samples a question.

    Of n samples with c right ones, k drawn without replacement are all wrong with probability C(n - c, k) / C(n, k).

    Raises:
        ValueError: a question has fewer than k samples.
    """
    fewest = min(map(len, right))
    if not 1 <= k <= fewest:
        raise ValueError(
            f"pass@{k} needs at least {max(k, 1)} samples of every question; one has {fewest}."
        )
    return sum(
        1 - math.comb(len(samples) - sum(samples), k) / math.comb(len(samples), k)
        for samples in right
    ) / len(right)


def _reference_text(reference: str) -> str:
    boxed = reference.rfind("\\boxed")
    if boxed >= 0:
        return reference[boxed:]
    return reference if "$" in reference else f"\\boxed{{{reference}}}"


def _parse(text: str, boxed_match_priority: int) -> list[Any]:
    plain = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    latex = LatexExtractionConfig(boxed_match_priority=boxed_match_priority)
    found: list[Any] = parse(plain, [latex, ExprExtractionConfig()])
    return found


def _number(parsed: Sequence[Any]) -> float | None:
    """The first of the parsed forms as a number; None where it is something else."""
    try:
        return float(parsed[0])
    except (IndexError, TypeError, ValueError, OverflowError):
        return None
