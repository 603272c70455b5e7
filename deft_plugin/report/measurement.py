"""What a model makes of each token that it is trained on: a few numbers, taken from its logits in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..objectives import Objective, TokenStatistics
from ..ops.fold import fold_, top_k_entropy
from ..ops.projection import LogitsTransform
from ..ops.sums import StatisticsRequest, Sums, empty_sums, statistics_dtype, statistics_of_sums
from .forward import logits_of, parameters_of
from .rows import Row

# Of the logits that a model returns at once, and of the copy of them that is folded.
LOGITS_BYTES = 2**30
FOLDED_BYTES = 2**27


@dataclass(frozen=True)
class TokenNumbers:
    """What a model makes of N tokens; tensors of shape (N,).

    Args:
        statistics: log p, collision and entropy, in nats.
        error_norm: the length of p - e_y, the gradient of -log p in the logits: sqrt(C2 - 2 p + 1).
        rank: int64, 1 where no token is more probable than the target.
        choice: int64, the most probable token.
        choice_p: its probability.
        top_k_entropies: entropies of the k most probable tokens, by k.
    """

    statistics: TokenStatistics
    error_norm: Tensor
    rank: Tensor
    choice: Tensor
    choice_p: Tensor
    top_k_entropies: dict[int, Tensor]


@dataclass(frozen=True)
class TokenTable(TokenNumbers):
    """The numbers of a sample's tokens, in the order of its rows, on the CPU.

    Args:
        row: int64, which of the sample's rows the token is in.
        position: int64, where in it.
        target: int64, the token itself.
    """

    row: Tensor
    position: Tensor
    target: Tensor

    def __len__(self) -> int:
        return self.target.numel()

    @property
    def p(self) -> Tensor:
        """The target's probability."""
        return self.statistics.p

    @property
    def collision(self) -> Tensor:
        """C2, the sum of squared probabilities: DEFT's focus."""
        assert self.statistics.collision is not None
        return self.statistics.collision

    @property
    def entropy(self) -> Tensor:
        """The Shannon entropy of the model's distribution, in nats."""
        assert self.statistics.entropy is not None
        return self.statistics.entropy

    def statistics_for(self, objective: Objective) -> TokenStatistics:
        """What the objective may know of these tokens."""
        if objective.top_k is None:
            return self.statistics
        return replace(self.statistics, top_k_entropy=self.top_k_entropies[objective.top_k])

    def gate(self, objective: Objective) -> Tensor:
        """The objective's gate. One that needs the optimizer step's mean of p gets the mean over this table."""
        return objective.at_mean(None).gate(self.statistics_for(objective)).detach()


def statistics_of_logits(
    logits: Tensor, targets: Tensor, top_ks: Sequence[int] = ()
) -> TokenNumbers:
    """Numbers of n tokens.

    Args:
        logits: (n, V), any floating dtype; left as they are.
        targets: (n,) int64, in [0, V).
        top_ks: for which k to take the entropy of the k most probable tokens.
    """
    scores = logits.to(statistics_dtype(logits.dtype), copy=True)
    target_score = scores.gather(1, targets.unsqueeze(1))
    rank = (scores > target_score).sum(1) + 1
    largest, choice = scores.max(1)
    choice_p = (largest - scores.logsumexp(1)).exp()
    top_k_entropies = {k: top_k_entropy(scores, None, LogitsTransform(), k) for k in top_ks}
    sums = empty_sums(len(targets), scores.dtype, scores.device)
    request = StatisticsRequest(collision=True, entropy=True)
    # The same pass as in training; of p - e_y it leaves sums over the other tokens, which do not cancel at p = 1.
    fold_(scores, None, LogitsTransform(), targets, request, sums, write_error=False)
    parts = Sums(*sums)
    return TokenNumbers(
        statistics=statistics_of_sums(sums, logits.size(1), request),
        error_norm=(parts.others.square() + parts.squares).sqrt() * parts.row_factor,
        rank=rank,
        choice=choice,
        choice_p=choice_p,
        top_k_entropies=top_k_entropies,
    )


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    top_ks: Sequence[int] = (),
    advance: Callable[[int], object] = lambda rows: None,
) -> TokenTable:
    """Run the model over the rows, and keep a few numbers of each token that is trained on.

    Args:
        model: a causal LM of transformers, or a PEFT model of one, in evaluation mode.
        rows: each with a token to train on, and none outside the vocabulary (see `check_vocabulary`).
        batch_size: most rows in a forward pass. Where the logits of their trained tokens would take more than
            `LOGITS_BYTES`, there are fewer; and a row that is too long alone is passed several times.
        top_ks: see `TokenTable.top_k_entropies`.
        advance: called with the number of rows that are done.

    Raises:
        ValueError: the model's logits are NaN.
    """
    vocab_size = model.config.get_text_config().vocab_size
    found: list[tuple[Tensor, Tensor, TokenNumbers]] = []
    for batch in _batches(rows, batch_size, LOGITS_BYTES // (4 * vocab_size)):
        for indices, positions, logits, targets in _forwards(model, batch, rows):
            found.extend(_folded(indices, positions, logits, targets, top_ks))
        advance(len(batch))
    row = torch.cat([indices for indices, _, _ in found])
    position = torch.cat([positions for _, positions, _ in found])
    # Batches are made by length.
    order = torch.argsort(row * (int(position.max()) + 1) + position)
    parts = [tokens for _, _, tokens in found]

    def joined(tensors: Sequence[Tensor | None]) -> Tensor:
        return torch.cat([tensor.cpu() for tensor in tensors if tensor is not None])[order].clone()

    table = TokenTable(
        row=row[order].clone(),
        position=position[order].clone(),
        target=torch.tensor([row.labels[at] for row in rows for at in row.scored]),
        statistics=TokenStatistics(
            log_p=joined([part.statistics.log_p for part in parts]),
            vocab_size=parts[0].statistics.vocab_size,
            is_top1=joined([part.statistics.is_top1 for part in parts]),
            collision=joined([part.statistics.collision for part in parts]),
            entropy=joined([part.statistics.entropy for part in parts]),
        ),
        error_norm=joined([part.error_norm for part in parts]),
        rank=joined([part.rank for part in parts]),
        choice=joined([part.choice for part in parts]),
        choice_p=joined([part.choice_p for part in parts]),
        top_k_entropies={k: joined([part.top_k_entropies[k] for part in parts]) for k in top_ks},
    )
    not_numbers = int(table.statistics.log_p.isnan().sum())
    if not_numbers:
        raise ValueError(
            f"the model's logits are NaN at {not_numbers:,} of {len(table):,} tokens: the checkpoint is damaged, or "
            "its numbers overflow in this dtype (--dtype)."
        )
    return table


def check_vocabulary(model: PreTrainedModel, rows: Sequence[Row]) -> None:
    """Raise `ValueError` where the rows have a token that the model does not."""
    vocab_size = model.config.get_text_config().vocab_size
    # A kernel on a GPU would say less of it, and end the process.
    known = min(vocab_size, getattr(model.get_input_embeddings(), "num_embeddings", vocab_size))
    largest = max(max(*row.input_ids, *row.labels) for row in rows)
    if largest >= known:
        raise ValueError(
            f"the data has token {largest:,}, outside the model's vocabulary [0, {known:,})."
        )


def _batches(rows: Sequence[Row], batch_size: int, most_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of about equal lengths."""
    batch: list[int] = []
    positions: set[int] = set()
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids)):
        together = positions.union(rows[index].scored)
        if batch and (len(batch) == batch_size or len(together) * (len(batch) + 1) > most_tokens):
            yield batch
            batch, together = [], set(rows[index].scored)
        batch.append(index)
        positions = together
    yield batch


def _forwards(
    model: PreTrainedModel, batch: Sequence[int], rows: Sequence[Row]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(row, position) of each trained token, and its logits (n, V) and target."""
    chosen = [rows[index] for index in batch]
    length = max(len(row.input_ids) for row in chosen)
    ids = torch.zeros(len(chosen), length, dtype=torch.long)
    attention_mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, -1)
    for at, row in enumerate(chosen):
        ids[at, : len(row.input_ids)] = torch.tensor(row.input_ids)
        attention_mask[at, : len(row.input_ids)] = 1
        # A position's logits are of the next token.
        scored = torch.tensor(row.scored)
        targets[at, scored - 1] = torch.tensor([row.labels[position] for position in row.scored])
    wanted = (targets >= 0).any(0).nonzero().squeeze(1)
    takes_positions = "logits_to_keep" in parameters_of(model)
    vocab_size = model.config.get_text_config().vocab_size
    most = max(LOGITS_BYTES // (4 * vocab_size * len(batch)), 1)
    for kept in wanted.split(most if takes_positions else max(len(wanted), 1)):
        logits = logits_of(model, ids, attention_mask, kept)
        kept_targets = targets[:, kept]
        mask = kept_targets >= 0
        line, column = mask.nonzero(as_tuple=True)
        flat = logits[line.to(logits.device), column.to(logits.device)]
        yield torch.tensor(batch)[line], kept[column] + 1, flat, kept_targets[mask]


def _folded(
    indices: Tensor, positions: Tensor, logits: Tensor, targets: Tensor, top_ks: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, TokenNumbers]]:
    tile = max(FOLDED_BYTES // (4 * logits.size(1)), 1)
    for part in range(0, len(targets), tile):
        some = slice(part, part + tile)
        tokens = statistics_of_logits(logits[some], targets[some].to(logits.device), top_ks)
        yield indices[some], positions[some], tokens
