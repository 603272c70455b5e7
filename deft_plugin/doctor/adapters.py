"""Adapters, and PEFT's DEFT among them: an adapter of the same name as this package's loss, and another thing.

PEFT's `DeftConfig`, "Decompositional Efficient Fine-Tuning", says which parameters are trained; the DEFT of arXiv 2602.11424
says what they are trained for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .finding import Finding

ADAPTER_CONFIG = "adapter_config.json"
# What an adapter's kind is named by, in YAMLs of Axolotl too.
_KIND_KEYS = ("peft_type", "adapter")
# Where YAMLs name a folder that may be an adapter's.
_FOLDER_KEYS = ("model_name_or_path", "base_model", "lora_model_dir")
_OTHER_DEFT = "is PEFT's Decompositional Efficient Fine-Tuning, a kind of adapter, and not this package's loss"


def check_adapter(path: Path) -> Iterator[Finding]:
    """What an adapter_config.json says of its adapter, which is not what it was trained with."""
    if not path.is_file():
        yield Finding(
            "error", f"is a folder without {ADAPTER_CONFIG}: name a YAML, or an adapter's"
        )
        return
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        yield Finding("error", f"{ADAPTER_CONFIG} cannot be read: {error}")
        return
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if not isinstance(kind, str):
        yield Finding("error", f"{ADAPTER_CONFIG} has no peft_type, as PEFT writes it")
    elif _is_deft(kind):
        yield Finding(
            "note",
            f"peft_type: {kind} {_OTHER_DEFT}; the loss that an adapter was trained with is not in its folder",
        )
    else:
        base = values.get("base_model_name_or_path")
        of = f" for {base!r}" if base else ""
        yield Finding(
            "ok",
            f"{kind} adapter{of}; its folder does not say which loss it was trained with",
        )


def notes_on_peft_deft(values: Mapping[Any, Any]) -> Iterator[Finding]:
    """A note for each place where a YAML names PEFT's DEFT, which may stand beside the loss or be taken for it."""
    loss = _loss_in(values)
    beside = (
        f"; {loss} is the loss, and neither needs the other"
        if loss
        else ", which is loss_type: deft (TRL) or deft_objective: deft (Axolotl)"
    )
    for place in _kinds(values):
        yield Finding("note", f"{place} {_OTHER_DEFT}{beside}")
    for key in _FOLDER_KEYS:
        folder = values.get(key)
        if isinstance(folder, str) and _holds_deft(folder):
            yield Finding(
                "note", f"{key}: {folder} has peft_type: DEFT, which {_OTHER_DEFT}{beside}"
            )


def _loss_in(values: Mapping[Any, Any]) -> str | None:
    """The key and value by which a YAML asks for this package's DEFT."""
    for key in ("loss_type", "deft_objective"):
        if values.get(key) == "deft":
            return f"{key}: deft"
    return None


def _kinds(values: Mapping[Any, Any]) -> Iterator[str]:
    """Where a key of the YAML, or one in a mapping there, has the name of PEFT's kind."""
    nested = {f"{key}.": value for key, value in values.items() if isinstance(value, Mapping)}
    for place, mapping in {"": values, **nested}.items():
        for key in _KIND_KEYS:
            if _is_deft(mapping.get(key)):
                yield f"{place}{key}: {mapping[key]}"


def _holds_deft(folder: str) -> bool:
    try:
        values = json.loads(Path(folder, ADAPTER_CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and _is_deft(values.get("peft_type"))


def _is_deft(kind: object) -> bool:
    return isinstance(kind, str) and kind.upper() == "DEFT"
