"""The numbers as files for other programs: report.json, tokens.csv and rows.csv.

Texts stand in quotes in the CSV files, as JSON writes them: spaces at their ends are seen, and a spreadsheet takes none of
them for a formula.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .silenced import RowLine, TokenLine


def write_json(path: Path, numbers: Any) -> None:
    """Dataclasses, containers and numbers; what is not finite becomes null."""
    text = json.dumps(plain(numbers), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_tokens(path: Path, lines: Sequence[TokenLine]) -> None:
    """One line a token."""
    has_after = bool(lines) and lines[0].p_after is not None
    gates = list(lines[0].gates) if lines else []
    header = ["row", "position", "token", "p", "focus", *(f"gate_{name}" for name in gates)]
    header += ["entropy", "rank", "choice", "choice_p", *(["p_after"] if has_after else [])]
    _write(
        path,
        header,
        (
            [
                line.row,
                line.position,
                _quoted(line.token),
                _number(line.p),
                _number(line.focus),
                *(_number(line.gates[name]) for name in gates),
                _number(line.entropy),
                line.rank,
                _quoted(line.choice),
                _number(line.choice_p),
                *([_number(line.p_after)] if line.p_after is not None else []),
            ]
            for line in lines
        ),
    )


def write_rows(path: Path, lines: Sequence[RowLine]) -> None:
    """One line a row."""
    gates = list(lines[0].mean_gates) if lines else []
    header = ["row", "tokens", *(f"mean_gate_{name}" for name in gates)]
    header += ["closed_gates", "mean_p", "nll", "mean_focus", "text"]
    _write(
        path,
        header,
        (
            [
                line.row,
                line.tokens,
                *(_number(line.mean_gates[name]) for name in gates),
                line.closed,
                _number(line.mean_p),
                _number(line.nll),
                _number(line.mean_focus),
                _quoted(line.text),
            ]
            for line in lines
        ),
    )


def plain(value: Any) -> Any:
    """What JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _write(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _number(value: float) -> str:
    return f"{value:.6g}"
