"""A model's held-out figures: likelihood, calibration, the task's own score, and what it has forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from answer_tokens import answer_tokens, exact_answers
from paper.words import jaro_winkler
from study_data import Row
from tasks import greedy_answers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALIBRATION_BINS = 15


def held_out_figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    score: str,
    batch_size: int = 32,
) -> dict[str, float]:
    """The figures by name.

    Returns:
        tokens: their number; nll, entropy: nats a token; p, focus: means over tokens; calibration_error: the expected
        calibration error of the first choice's probability, in 15 bins; exact: share of rows whose greedy answer is the
        reference; score: the task's own figure, in [0, 1].
    """
    tokens = answer_tokens(model, tokenizer, [row.messages for row in rows], batch_size)
    exact = exact_answers(tokens)
    figures = {
        "tokens": len(tokens.log_p),
        "nll": -tokens.log_p.mean().item(),
        "p": tokens.log_p.exp().mean().item(),
        "focus": tokens.collision.mean().item(),
        "entropy": tokens.entropy.mean().item(),
        "calibration_error": calibration_error(tokens.top_p, tokens.is_top1),
        "exact": exact,
    }
    if score == "exact":
        return {**figures, "score": exact}
    if score == "tokens":
        return {**figures, "score": tokens.is_top1.double().mean().item()}
    if score == "first_token":
        first = tokens.row.diff(prepend=tokens.row.new_tensor([-1])) != 0
        return {**figures, "score": tokens.is_top1[first].double().mean().item()}
    return {**figures, "score": mean_similarity(model, tokenizer, rows, batch_size)}


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """Mean distance between confidence and accuracy over bins of confidence, weighted by their tokens."""
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    zeros = torch.zeros(bins, dtype=torch.float64)
    gap = zeros.scatter_add(0, bin_of, confidence.double() - correct.double())
    return (gap.abs().sum() / len(confidence)).item()


def mean_similarity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
    max_new_tokens: int = 12,
) -> float:
    """Mean Jaro-Winkler similarity of greedy answers and references, as the paper takes it."""
    total = 0.0
    ordered = sorted(rows, key=lambda row: len(row.question))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        prompts = [row.messages["prompt"] for row in batch]
        with torch.inference_mode():
            answers = greedy_answers(model, tokenizer, prompts, max_new_tokens)
        total += sum(
            jaro_winkler(answer, row.answer) for row, answer in zip(batch, answers, strict=True)
        )
    return total / len(rows)


def text_nll(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, window: int
) -> float:
    """nll of a text's first `tokens` tokens, in nats a token, read in windows; each window's first has none."""
    ids = torch.tensor([tokenizer(text).input_ids[:tokens]], device=model.device)
    total = count = 0.0
    with torch.inference_mode():
        for part in ids.split(window, dim=1):
            log_p = model(input_ids=part).logits[0, :-1].float().log_softmax(1)
            total -= log_p.gather(1, part[0, 1:, None]).sum().item()
            count += part.size(1) - 1
    return total / count
