"""The page: one file that needs no network, filled from the numbers by a template."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

import deft_plugin

from ..metrics import CLOSED_GATE
from .analysis import BAND_LABELS, Effect, Standing
from .changes import MARKED_CHANGE, Changes
from .figures.dress import Picture
from .measurement import TokenTable
from .regimes import REGIMES
from .rows import Row
from .runs import COMPARED, RunFigures
from .silenced import KindLine, RowLine, Texts, TokenLine, row_order
from .text import Piece, flowing

# What the page shows of a large sample; the CSV files have all.
MOST_TOKENS = 10_000
MOST_TOKEN_LINES = 40
MOST_KIND_LINES = 20
# A mean focus that lies further above the mean probability of the target is told.
SETTLED_ELSEWHERE = 0.15
# Of a prompt's text, at its beginning and its end.
PROMPT_CHARACTERS = 400


@dataclass(frozen=True)
class TokenView:
    """A token in a text: what is shown, its gate, whether it is a special token or a part of a character."""

    text: str
    gate: float
    is_special: bool
    is_part: bool


@dataclass(frozen=True)
class Segment:
    """Text that is not trained on, or tokens that are."""

    context: str = ""
    tokens: list[TokenView] = field(default_factory=list)


@dataclass(frozen=True)
class RowView:
    """A row's figures and its text."""

    line: RowLine
    segments: list[Segment]


@dataclass(frozen=True)
class ShadedRows:
    """The rows that the page shows.

    Args:
        rows: those silenced most first.
        data: of each of their tokens, in the page's order, what is shown when it is pointed at.
    """

    rows: list[RowView]
    data: dict[str, Any]


@dataclass(frozen=True)
class Content:
    """All that the page says; what is None is left out, and a hint takes its place.

    Args:
        title: of the page.
        facts: what was measured, name and value.
        objective: by which texts are shaded.
        stop: the end-of-text token, where its gate is closed more often than not.
        pictures: by name.
        task_figures: names of the figures of tasks that runs have.
    """

    title: str
    facts: list[tuple[str, str]]
    objective: str
    pictures: dict[str, Picture] = field(default_factory=dict)
    standing: Standing | None = None
    effects: list[Effect] = field(default_factory=list)
    sample_notes: list[str] = field(default_factory=list)
    shaded: ShadedRows | None = None
    row_count: int = 0
    token_lines: list[TokenLine] = field(default_factory=list)
    stop: KindLine | None = None
    kind_lines: list[KindLine] = field(default_factory=list)
    changes: Changes | None = None
    standing_after: Standing | None = None
    after_label: str | None = None
    run_label: str | None = None
    runs: list[RunFigures] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    task_figures: list[str] = field(default_factory=list)


def render(content: Content) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("deft_plugin.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":")}
    environment.filters.update(
        decimals=_decimals,
        percent=_percent,
        probability=_probability,
        signed=_signed,
        data_uri=_data_uri,
    )
    template = environment.get_template("page.html.jinja")
    return template.render(
        page=content,
        regimes=REGIMES,
        bands=BAND_LABELS,
        closed=CLOSED_GATE,
        settled_elsewhere=SETTLED_ELSEWHERE,
        marked=MARKED_CHANGE,
        linked_rows={row.line.row for row in content.shaded.rows} if content.shaded else set(),
        version=deft_plugin.__version__,
        compared_titles={metric: COMPARED[metric][0] for metric in COMPARED},
    )


def shaded_rows(
    rows: Sequence[Row],
    table: TokenTable,
    gates: Mapping[str, Tensor],
    texts: Texts,
    lines: Sequence[RowLine],
    shown: str,
    after: TokenTable | None = None,
) -> ShadedRows:
    """The texts of the rows that `shown` silences most, `MOST_TOKENS` of them at most, one row at least."""
    views: list[RowView] = []
    order: list[int] = []
    first_of_row = _first_of_row(table, len(rows))
    gate_list = gates[shown].tolist()
    for index, line in zip(row_order(table, gates[shown]), lines, strict=True):
        if views and len(order) + line.tokens > MOST_TOKENS:
            break
        scored = rows[index].scored
        places = range(first_of_row[index], first_of_row[index] + len(scored))
        gate_at = {at: gate_list[place] for at, place in zip(scored, places, strict=True)}
        views.append(RowView(line, _segments(texts.pieces[index], gate_at)))
        order.extend(places)
    return ShadedRows(views, _data(table, gates, texts, order, after))


def _segments(pieces: Sequence[Piece], gate_at: Mapping[int, float]) -> list[Segment]:
    segments: list[Segment] = []
    context: list[str] = []

    def close() -> None:
        if context:
            segments.append(Segment(context=_shortened(flowing("".join(context)))))
            context.clear()

    for at, piece in enumerate(pieces):
        if at not in gate_at:
            context.append(piece.text)
            continue
        close()
        if not segments or not segments[-1].tokens:
            segments.append(Segment())
        is_part = piece.part < piece.parts
        text = "◌" if is_part else flowing(piece.text)
        segments[-1].tokens.append(TokenView(text, gate_at[at], piece.is_special, is_part))
    close()
    return segments


def _data(
    table: TokenTable,
    gates: Mapping[str, Tensor],
    texts: Texts,
    order: Sequence[int],
    after: TokenTable | None,
) -> dict[str, Any]:
    """Columns, in as few characters as is sensible; texts are numbers of `words`."""
    words: dict[str, int] = {}
    row, position = table.row.tolist(), table.position.tolist()
    tokens = [texts.pieces[row[at]][position[at]].visible for at in order]
    choices = [texts.choices[at] for at in order]
    columns = {
        "p": table.p,
        "focus": table.collision,
        "entropy": table.entropy,
        "choice_p": table.choice_p,
        **({} if after is None else {"p_after": after.p}),
    }
    data: dict[str, Any] = {name: _short_numbers(values, order) for name, values in columns.items()}
    data["rank"] = table.rank[list(order)].tolist()
    data["token"] = [words.setdefault(text, len(words)) for text in tokens]
    data["choice"] = [words.setdefault(text, len(words)) for text in choices]
    # In thousandths.
    data["gates"] = {
        name: (gate[list(order)] * 1000).round().int().tolist() for name, gate in gates.items()
    }
    data["words"] = list(words)
    return data


def _short_numbers(values: Tensor, order: Sequence[int]) -> list[float]:
    return [float(f"{value:.3g}") for value in values[list(order)].tolist()]


def _first_of_row(table: TokenTable, count: int) -> list[int]:
    """Where each row's tokens begin in the table."""
    counts = table.row.bincount(minlength=count)
    return (counts.cumsum(0) - counts).tolist()


def _shortened(text: str) -> str:
    if len(text) <= 2 * PROMPT_CHARACTERS:
        return text
    left_out = len(text) - 2 * PROMPT_CHARACTERS
    return f"{text[:PROMPT_CHARACTERS]} […{left_out:,} characters left out…] {text[-PROMPT_CHARACTERS:]}"


def _decimals(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _signed(value: float | None) -> str:
    if value is None:
        return "–"
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}".replace("-", "−")


def _percent(value: float | None, digits: int = 0) -> str:
    if value is None:
        return "–"
    if 0 < value < 0.5 * 10 ** -(digits + 2):
        return f"<{10**-digits:g}\u00a0%"
    return f"{100 * value:.{digits}f}\u00a0%"


def _probability(value: float | None) -> str:
    """A probability with as many digits as say something."""
    if value is None:
        return "–"
    if value == 0 or value >= 0.001:
        return f"{value:.3f}"
    mantissa, power = f"{value:.0e}".split("e")
    return f"{mantissa}·10{''.join(_SUPERSCRIPTS[character] for character in str(int(power)))}"


_SUPERSCRIPTS = dict(zip("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹", strict=True))


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
