"""How the core computes, apart from what: the path, the tiles, and what is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

Path = Literal["auto", "triton", "quack", "chunked", "reference"]
PATHS: tuple[str, ...] = ("auto", "triton", "quack", "chunked", "reference")
# What computes the tiles.
TiledPath = Literal["triton", "quack", "chunked"]


@dataclass(frozen=True)
class CoreSettings:
    """Settings of `linear_gated_loss`, under the names of its arguments and documented there.

    Raises:
        ValueError: a value that no call could have.
    """

    path: str = "auto"
    tile_rows: int | None = None
    skip_below: float = 0.0

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise ValueError(
                f"path={self.path!r} is not valid. Choices: {', '.join(map(repr, PATHS))}."
            )
        rows = self.tile_rows
        if rows is not None and (
            not isinstance(rows, Integral) or isinstance(rows, bool) or rows < 1
        ):
            raise ValueError(f"tile_rows is {rows!r}; it must be an integer >= 1, or None.")
        share = self.skip_below
        is_number = isinstance(share, Real) and not isinstance(share, bool)
        if not is_number or not 0 <= share < 1:
            quoted = " A text is no number: YAML takes 1e-3 for text, and 0.001 for a number."
            raise ValueError(
                f"skip_below is {share!r}; it must be a number in [0, 1)."
                f"{quoted if isinstance(share, str) else ''}"
            )
        if share and self.path in ("quack", "reference"):
            raise ValueError(f"skip_below would be ignored with path={self.path!r}: set it to 0.")


def split_settings(parameters: Mapping[str, Any]) -> tuple[CoreSettings, dict[str, Any]]:
    """The core's settings among an objective's parameters, and the rest, which is the objective's."""
    names = {field.name for field in dataclasses.fields(CoreSettings)}
    settings = {name: value for name, value in parameters.items() if name in names}
    rest = {name: value for name, value in parameters.items() if name not in names}
    return CoreSettings(**settings), rest
