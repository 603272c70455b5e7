"""What a model makes of the tokens of reference answers, from one forward pass over them.

A greedy answer is the reference exactly if each of its tokens is the model's first choice after those before it, so that the
share of exact answers needs no generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deft_plugin.report.measurement import statistics_of_logits


@dataclass(frozen=True)
class AnswerTokens:
    """Statistics of N tokens of reference answers, end of turn included; each of shape (N,).

    Attributes:
        row: which row a token is of.
        log_p: log-probability of the token, in nats.
        collision: sum of squared probabilities, DEFT's focus.
        entropy: Shannon entropy, in nats.
        top_p: the largest probability.
        is_top1: bool; whether the token is the model's first choice.
    """

    row: Tensor
    log_p: Tensor
    collision: Tensor
    entropy: Tensor
    top_p: Tensor
    is_top1: Tensor


@torch.inference_mode()
def answer_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> AnswerTokens:
    """Statistics of the answers' tokens, in the order of the rows, which are messages: a prompt and a completion."""
    found: list[tuple[Tensor, ...]] = []
    for indices, ids, answer_lengths in _batches(tokenizer, rows, batch_size):
        width = max(map(len, ids))
        inputs = torch.full((len(ids), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(inputs)
        # On the left, so that the answers end where the logits do.
        for row, sequence in enumerate(ids):
            inputs[row, width - len(sequence) :] = torch.tensor(sequence)
            mask[row, width - len(sequence) :] = 1
        kept = max(answer_lengths)
        # By index: a slice of hidden states is not contiguous, and lm_head's weight would be copied for each row.
        positions = torch.arange(width - kept - 1, width, device=model.device)
        logits = model(
            input_ids=inputs.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(model.device),
            logits_to_keep=positions,
        ).logits[:, :-1]
        for row, length in enumerate(answer_lengths):
            targets = torch.tensor(ids[row][-length:], device=logits.device)
            tokens = statistics_of_logits(logits[row, kept - length :], targets)
            values = (
                tokens.statistics.log_p,
                tokens.statistics.collision,
                tokens.statistics.entropy,
                tokens.choice_p,
                # Not `is_top1`, for which a tie is a hit: a greedy answer has one token.
                tokens.choice == targets,
            )
            found.append((torch.full((length,), indices[row]), *(value.cpu() for value in values)))
    row, *values = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = row.argsort(stable=True)
    return AnswerTokens(row[order], *(value[order] for value in values))


def exact_answers(tokens: AnswerTokens) -> float:
    """Share of rows whose greedy answer is the reference, token by token."""
    rows = int(tokens.row.max()) + 1
    misses = torch.zeros(rows).scatter_add(0, tokens.row, (~tokens.is_top1).float())
    return (misses == 0).double().mean().item()


def _batches(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], batch_size: int
) -> Iterator[tuple[list[int], list[list[int]], list[int]]]:
    """Indices, token ids and answers' lengths of rows of similar length."""
    encoded = []
    for index, row in enumerate(rows):
        prompt, completion = row["prompt"], row["completion"]
        begun = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(prompt + completion, return_dict=False)
        assert whole[: len(begun)] == begun
        encoded.append((index, whole, len(whole) - len(begun)))
    encoded.sort(key=lambda item: len(item[1]))
    for start in range(0, len(encoded), batch_size):
        indices, ids, lengths = zip(*encoded[start : start + batch_size], strict=True)
        yield list(indices), list(ids), list(lengths)
