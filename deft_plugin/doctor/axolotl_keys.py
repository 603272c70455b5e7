"""Keys of an Axolotl YAML that neither Axolotl nor its registered plugins know."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .finding import Finding


def unknown_keys(values: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys of an Axolotl YAML, nested ones too, that neither Axolotl nor its registered plugins know.

    Axolotl ignores them. An error where one looks misspelt; others may be left over from earlier versions.
    """
    from axolotl.integrations.config import merge_input_args

    from ..axolotl.adjustments import CROSS_ENTROPIES

    known = merge_input_args()[0]
    unlisted = [key for key in CROSS_ENTROPIES if key in values and key not in known.model_fields]
    for key in unlisted:
        yield Finding(
            "note",
            f"Axolotl ignores the key {key!r}, which needs its plugin, and the gated head needs neither",
        )
    values = {key: value for key, value in values.items() if key not in unlisted}
    yield from _unknown(values, [known], "")


def _unknown(values: Any, models: Sequence[Any], place: str) -> Iterator[Finding]:
    """Keys below `place` that none of these pydantic models has."""
    if isinstance(values, list):
        for index, value in enumerate(values):
            yield from _unknown(value, models, f"{place.removesuffix('.')}[{index}].")
    # A model that takes any keys checks them itself.
    elif isinstance(values, Mapping) and not any(
        model.model_config.get("extra") == "allow" for model in models
    ):
        fields: dict[str, list[Any]] = {}
        for model in models:
            for name, field in model.model_fields.items():
                for key in filter(None, (name, field.alias)):
                    fields.setdefault(key, []).append(field.annotation)
        for key, value in values.items():
            if key in fields:
                nested = [*_models_in(fields[key])]
                yield from _unknown(value, nested, f"{place}{key}.") if nested else ()
            else:
                close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.75)
                text = f"Axolotl ignores the key {place + str(key)!r}, which it does not know"
                if close:
                    yield Finding("error", f"{text}. Did you mean {close[0]!r}?")
                else:
                    yield Finding("note", text)


def _models_in(annotations: Iterable[Any]) -> Iterator[Any]:
    """The pydantic models that a field may hold; none where it may hold a dict of anything."""
    from pydantic import BaseModel

    parts = [part for annotation in annotations for part in (annotation, *_parts_of(annotation))]
    if not any(part is dict or typing.get_origin(part) is dict for part in parts):
        yield from (part for part in parts if inspect.isclass(part) and issubclass(part, BaseModel))


def _parts_of(annotation: Any) -> Iterator[Any]:
    for part in typing.get_args(annotation):
        yield part
        yield from _parts_of(part)
