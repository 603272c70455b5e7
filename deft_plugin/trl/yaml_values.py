"""Values of a YAML file against the types of the fields they are for, which TRL's parser compares for texts alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

# What a field of a type takes; texts are converted, or refused, by the parser.
_TAKEN: dict[Any, tuple[type, ...]] = {
    int: (int, str),
    float: (int, float, str),
    bool: (int, str, NoneType),
    str: (str, int, float, NoneType),
    dict: (dict, str),
    NoneType: (NoneType,),
}
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_NAMES |= {dict: "a mapping", list: "a list", NoneType: "null"}
# Of the loss more is said, and transformers takes a list of FSDP's options, whatever the field's type.
_NOT_LOOKED_AT = ("loss_type", "loss_kwargs", "fsdp")
# Of other types than their fields': PEFT divides it.
_INSTEAD: dict[str, Any] = {"lora_alpha": float}
_PATHS = ("output_dir",)


def mistyped_values(values: Mapping[str, Any], field_classes: Any) -> Iterator[str]:
    """What is wrong with values that the field of their name does not take, a sentence each.

    Args:
        values: content of a YAML file.
        field_classes: the dataclasses whose fields its keys are.
    """
    hints = {key: hint for cls in field_classes for key, hint in get_type_hints(cls).items()}
    hints |= {key: hint for key, hint in _INSTEAD.items() if key in hints}
    for key, value in values.items():
        if key not in hints or key in _NOT_LOOKED_AT:
            continue
        choices = _choices(hints[key])
        if isinstance(value, bool) and (key in _PATHS or choices):
            word = "yes" if value else "no"
            yield f'{key}: {value!r} must be text: YAML reads {word} as {str(value).lower()}; write "{word}" in quotes.'
        elif isinstance(value, int | float) and key in _PATHS:
            yield f"{key}: {value!r} must be text: write it in quotes."
        elif choices and value not in choices:
            yield f"{key}: {value!r} is not valid. Choices: {', '.join(choices)}."
        elif not _fits(value, hints[key]):
            yield f"{key}: {value!r} must be {' or '.join(map(_name, _parts(hints[key])))}."


def _choices(hint: Any) -> list[str]:
    """The texts that a field takes alone, which transformers makes an enum of, without the key where it cannot."""
    enums = (part for part in _parts(hint) if isinstance(part, type) and issubclass(part, Enum))
    return [choice.value for enum in enums for choice in enum]


def _fits(value: Any, hint: Any) -> bool:
    parts = _parts(hint)
    # Text beside a mapping is JSON, which a number is not.
    if dict in map(_kind, parts) and not isinstance(value, str):
        parts = tuple(part for part in parts if part is not str)
    return any(_fits_one(value, part) for part in parts)


def _fits_one(value: Any, part: Any) -> bool:
    kind = _kind(part)
    if kind is list:
        (element,) = get_args(part)
        if isinstance(value, str):
            return _fits(value, element)
        return isinstance(value, list) and all(_fits(each, element) for each in value)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, Mapping)
    # 1.0e+3 is no integer in YAML.
    is_whole = kind is int and isinstance(value, float) and value.is_integer()
    return is_whole or isinstance(value, _TAKEN.get(kind, object))


def _name(part: Any) -> str:
    kind = _kind(part)
    elements = [element for element in get_args(part) if dataclasses.is_dataclass(element)]
    if kind is list and elements:
        fields = dataclasses.fields(elements[0])
        required = (field.name for field in fields if field.default is dataclasses.MISSING)
        return f"a list of mappings, each with {', '.join(required)}"
    return "a mapping" if dataclasses.is_dataclass(kind) else _NAMES[kind]


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _kind(part: Any) -> Any:
    return get_origin(part) or part
