"""Which tokens and rows an objective silences: all of them in order, with their text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..metrics import CLOSED_GATE
from .analysis import means_by
from .measurement import TokenTable
from .rows import Row
from .text import Decoder, Piece, visible

# Tokens that occur less often say little about their kind.
LEAST_OCCURRENCES = 3
# What says the same a fourth time says little.
MOST_ALIKE = 3
_BEFORE_CHARACTERS, _AFTER_CHARACTERS = 32, 20


@dataclass(frozen=True)
class TokenLine:
    """A token that is trained on.

    Args:
        row: number of its row in the data set.
        position: in the row, from 0.
        token: its text, with marks for what cannot be seen.
        before, after: the text around it.
        p: the target's probability.
        focus: C2, the sum of squared probabilities.
        gates: by objective.
        entropy: in nats.
        rank: 1 where it is the model's first choice.
        choice: the text of that first choice.
        choice_p: its probability.
        p_after: the target's probability under the second checkpoint; None without one.
    """

    row: int
    position: int
    token: str
    before: str
    after: str
    p: float
    focus: float
    gates: dict[str, float]
    entropy: float
    rank: int
    choice: str
    choice_p: float
    p_after: float | None = None


@dataclass(frozen=True)
class RowLine:
    """A row.

    Args:
        row: its number in the data set.
        tokens: how many of its tokens are trained on.
        mean_gates: by objective.
        closed: how many of the tokens have a gate below `CLOSED_GATE` under the objective that is shown.
        mean_p: mean probability of the targets.
        nll: mean -log p, in nats.
        mean_focus: mean C2.
        text: what is trained on.
    """

    row: int
    tokens: int
    mean_gates: dict[str, float]
    closed: int
    mean_p: float
    nll: float
    mean_focus: float
    text: str


@dataclass(frozen=True)
class KindLine:
    """A token that occurs several times, with the means over its occurrences."""

    token: str
    occurrences: int
    mean_gate: float
    closed_share: float
    mean_p: float


@dataclass(frozen=True)
class Texts:
    """The sample as text.

    Args:
        pieces: of each row's tokens, prompts included.
        choices: the model's first choice at each token of the table.
    """

    pieces: list[list[Piece]]
    choices: list[str]

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], table: TokenTable
    ) -> Texts:
        """Decode the rows and the model's choices."""
        decoder = Decoder(tokenizer)
        pieces = [decoder.pieces(row.input_ids) for row in rows]
        choices = []
        for index, position, target, choice in zip(
            table.row.tolist(),
            table.position.tolist(),
            table.target.tolist(),
            table.choice.tolist(),
            strict=True,
        ):
            if choice == target:
                choices.append(pieces[index][position].visible)
            else:
                before = rows[index].input_ids[max(position - 8, 0) : position]
                choices.append(decoder.text_at(before, choice))
        return cls(pieces, choices)


def silenced_first(gate: Tensor, p: Tensor) -> list[int]:
    """The order of tokens by gate, the least probable first where gates are equal."""
    order = torch.argsort(p, stable=True)
    return order[torch.argsort(gate[order], stable=True)].tolist()


def token_lines(
    rows: Sequence[Row],
    table: TokenTable,
    gates: Mapping[str, Tensor],
    texts: Texts,
    shown: str,
    after: TokenTable | None = None,
) -> list[TokenLine]:
    """A line for each token, those that `shown` silences most first."""
    columns = {
        "row": table.row.tolist(),
        "position": table.position.tolist(),
        "p": table.p.tolist(),
        "focus": table.collision.tolist(),
        "entropy": table.entropy.tolist(),
        "rank": table.rank.tolist(),
        "choice_p": table.choice_p.tolist(),
    }
    gate_lists = {name: gate.tolist() for name, gate in gates.items()}
    p_after = None if after is None else after.p.tolist()
    lines = []
    for at in silenced_first(gates[shown], table.p):
        index, position = columns["row"][at], columns["position"][at]
        pieces = texts.pieces[index]
        lines.append(
            TokenLine(
                row=rows[index].number,
                position=position,
                token=pieces[position].visible,
                before=_text_before(pieces, position),
                after=_text_after(pieces, position),
                p=columns["p"][at],
                focus=columns["focus"][at],
                gates={name: values[at] for name, values in gate_lists.items()},
                entropy=columns["entropy"][at],
                rank=columns["rank"][at],
                choice=texts.choices[at],
                choice_p=columns["choice_p"][at],
                p_after=None if p_after is None else p_after[at],
            )
        )
    return lines


def row_order(table: TokenTable, gate: Tensor) -> list[int]:
    """Indices of the rows, those with the smallest mean gate first."""
    means = [mean or 0.0 for mean in means_by(gate, table.row, int(table.row.max()) + 1)]
    return sorted(range(len(means)), key=lambda index: means[index])


def row_lines(
    rows: Sequence[Row],
    table: TokenTable,
    gates: Mapping[str, Tensor],
    texts: Texts,
    shown: str,
) -> list[RowLine]:
    """A line for each row, those that `shown` silences most first."""
    lines = []
    for index in row_order(table, gates[shown]):
        mine = table.row == index
        scored = set(rows[index].scored)
        text = "".join(piece.text for at, piece in enumerate(texts.pieces[index]) if at in scored)
        lines.append(
            RowLine(
                row=rows[index].number,
                tokens=int(mine.sum()),
                mean_gates={
                    name: float(gate[mine].double().mean()) for name, gate in gates.items()
                },
                closed=int((gates[shown][mine] < CLOSED_GATE).sum()),
                mean_p=float(table.p[mine].double().mean()),
                nll=float(-table.statistics.log_p[mine].double().mean()),
                mean_focus=float(table.collision[mine].double().mean()),
                text=text,
            )
        )
    return lines


def kind_lines(lines: Sequence[TokenLine], shown: str) -> list[KindLine]:
    """Tokens that occur several times, those silenced most on average first."""
    kinds: dict[str, list[TokenLine]] = {}
    for line in lines:
        kinds.setdefault(line.token, []).append(line)
    found = [
        KindLine(
            token=token,
            occurrences=len(same),
            mean_gate=sum(line.gates[shown] for line in same) / len(same),
            closed_share=sum(line.gates[shown] < CLOSED_GATE for line in same) / len(same),
            mean_p=sum(line.p for line in same) / len(same),
        )
        for token, same in kinds.items()
        if len(same) >= LEAST_OCCURRENCES
    ]
    return sorted(found, key=lambda kind: kind.mean_gate)


def varied(lines: Sequence[TokenLine]) -> list[TokenLine]:
    """The lines in their order, without those of tokens that were there `MOST_ALIKE` times."""
    seen: Counter[str] = Counter()
    kept = []
    for line in lines:
        seen[line.token.strip("␣")] += 1
        if seen[line.token.strip("␣")] <= MOST_ALIKE:
            kept.append(line)
    return kept


def stop_of(tokenizer: PreTrainedTokenizerBase, table: TokenTable, gate: Tensor) -> KindLine | None:
    """The token at which generation stops, where its gate is closed more often than not; else None."""
    mine = table.target == (-1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
    if not mine.any():
        return None
    closed_share = float((gate[mine] < CLOSED_GATE).double().mean())
    if closed_share <= 0.5:
        return None
    return KindLine(
        token=str(tokenizer.eos_token),
        occurrences=int(mine.sum()),
        mean_gate=float(gate[mine].double().mean()),
        closed_share=closed_share,
        mean_p=float(table.p[mine].double().mean()),
    )


def _text_before(pieces: Sequence[Piece], position: int) -> str:
    text = ""
    for piece in reversed(pieces[:position]):
        if len(text) >= _BEFORE_CHARACTERS:
            break
        text = piece.text + text
    return _around(text[-_BEFORE_CHARACTERS:])


def _text_after(pieces: Sequence[Piece], position: int) -> str:
    # The rest of a character belongs to the token itself.
    text = ""
    for piece in pieces[position + 1 + pieces[position].parts - pieces[position].part :]:
        if len(text) >= _AFTER_CHARACTERS:
            break
        text += piece.text
    return _around(text[:_AFTER_CHARACTERS])


def _around(text: str) -> str:
    return visible(text).replace("␣", " ") if text else ""
