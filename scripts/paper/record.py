"""A file of answered questions: a header line, then a line for each question, written as they come.

An evaluation that was interrupted goes on where it stopped, and ends with the file that it would have had.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Header = dict[str, Any]
Row = dict[str, Any]


def start(path: Path, header: Header) -> list[Row]:
    """Begin the file, or go on with it: the rows that it has.

    A last line that was cut short is taken off.

    Raises:
        ValueError: it has another header. The message says what differs, and what to do.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise ValueError(f"--output {path} is no file to write to: {error.strerror}.") from None
    # A header that was cut short, and no other file of one line.
    if _line(header).encode().startswith(content):
        path.write_text(_line(header), encoding="utf-8")
        return []
    earlier, rows = read(path)
    # As the file has it: JSON makes lists of tuples.
    header = json.loads(_line(header))
    changed = [
        f"{name} was {earlier.get(name)!r} and is {header.get(name)!r}"
        for name in sorted(earlier.keys() | header.keys())
        if earlier.get(name) != header.get(name)
    ]
    if changed:
        raise ValueError(
            f"{path} has answers of another evaluation ({'; '.join(changed)}). Evaluate as then to go on with it, or "
            "take another --output, or delete it."
        )
    with path.open("r+b") as file:
        file.truncate(len(_whole_lines(content)))
    return rows


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, rows))


def read(path: Path) -> tuple[Header, list[Row]]:
    """The header and the rows, the last of a question that is there twice, without a last line that was cut short.

    Raises:
        ValueError: it is no such file.
    """
    try:
        text = _whole_lines(path.read_bytes()).decode()
        header, *rows = (json.loads(line) for line in text.splitlines())
        if not all(isinstance(line, dict) for line in (header, *rows)) or "suite" not in header:
            raise ValueError
    except (OSError, ValueError):
        raise ValueError(f"{path} is not a file of scripts/paper/evaluate.py.") from None
    # Two evaluations may have written at once.
    return header, [*{(row.get("benchmark"), row.get("index")): row for row in rows}.values()]


def _line(content: dict[str, Any]) -> str:
    # U+2028 and the like, which str.splitlines takes for ends of lines, are escaped.
    return json.dumps(content) + "\n"


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]
