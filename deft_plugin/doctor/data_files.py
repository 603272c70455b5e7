"""Files and folders that an Axolotl YAML names and that are not there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".txt", ".gz", ".zst")


def missing_files(values: Mapping[str, Any]) -> Iterator[str]:
    """Files and folders that are named and not there; what may be a name on the hub cannot be told."""
    if _is_missing(values["base_model"]):
        yield f"base_model: {values['base_model']} does not exist"
    for key in ("datasets", "test_datasets", "pretraining_dataset"):
        datasets = values.get(key)
        for index, dataset in enumerate(datasets if isinstance(datasets, list) else [datasets]):
            if isinstance(dataset, Mapping):
                path, files = dataset.get("path"), dataset.get("data_files") or []
                paths = [path]
                # Of a name on the hub, they are in that repository.
                if isinstance(path, str) and os.path.exists(path):
                    paths += [files] if isinstance(files, str) else list(files)
                yield from (
                    f"{key}[{index}]: {path} does not exist" for path in paths if _is_missing(path)
                )


def _is_missing(path: Any) -> bool:
    """Whether this is no name on the hub, owner/name, and no address, but a path with nothing there."""
    if not isinstance(path, str) or "://" in path or any(mark in path for mark in "*?["):
        return False
    may_be_name = path.count("/") <= 1 and not path.startswith((".", "/", "~"))
    is_path = not may_be_name or Path(path).suffix in _DATA_SUFFIXES
    return is_path and not os.path.exists(path)
