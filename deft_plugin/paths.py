"""Names of models and data: of something here, or of something on the hub."""

from __future__ import annotations

import os
from pathlib import Path

# Of files, which no name on the hub has.
_SUFFIXES = (
    *(".json", ".jsonl", ".parquet", ".arrow", ".csv", ".txt", ".gz", ".zst"),
    *(".jinja", ".j2"),
)
NEEDED = "A model (a folder, or a name on the hub) and data (a folder with train.jsonl, or a name on the hub) are needed."
TILDE = "~ is expanded by a shell, not in a YAML file: write the whole path"


def is_missing(name: str) -> bool:
    """Whether this is a path with nothing there."""
    return has_nothing_here(name) and not _may_be_on_hub(name)


def is_left_to_the_hub(name: str) -> bool:
    """Whether there is nothing of that name here, and it has the form of one on the hub: owner/name, or a name alone."""
    return has_nothing_here(name) and _may_be_on_hub(name)


def has_nothing_here(name: str) -> bool:
    """Whether there is no file or folder of that name; what is an address or has wildcards may be one."""
    is_address_or_pattern = "://" in name or any(mark in name for mark in "*?[")
    return not is_address_or_pattern and not os.path.exists(name)


def _may_be_on_hub(name: str) -> bool:
    is_path = name.count("/") > 1 or name.startswith((".", "/", "~"))
    return not is_path and Path(name).suffix not in _SUFFIXES
