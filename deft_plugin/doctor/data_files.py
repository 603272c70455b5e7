"""Files and folders that a YAML names and that are not there; what may be a name on the hub cannot be told."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from ..paths import TILDE, is_left_to_the_hub, is_missing
from .finding import Finding


def missing_files(values: Mapping[str, Any]) -> Iterator[Finding]:
    """What an Axolotl YAML names and is not there; a note on what begins with a folder here and may be on the hub."""
    for place, path in _named_to_axolotl(values):
        if not isinstance(path, str):
            continue
        if is_missing(path):
            remedy = f" ({TILDE})" if path.startswith("~") else ""
            yield Finding("error", f"{place}: {path} does not exist{remedy}")
        elif is_left_to_the_hub(path) and os.path.isdir(os.path.dirname(path)):
            yield _left_to_the_hub(place, path)


def missing_files_of_trl(values: Mapping[str, Any]) -> Iterator[Finding]:
    """What a YAML of `trl sft` names and is not there, with a note on what may be on the hub."""
    keys = ("model_name_or_path", "dataset_name", "chat_template_path")
    named = [(key, values.get(key)) for key in keys]
    datasets = values.get("datasets")
    for index, dataset in enumerate(datasets if isinstance(datasets, list) else []):
        if isinstance(dataset, Mapping):
            named.append((f"datasets[{index}].path", dataset.get("path")))
    for place, path in named:
        # Of ~ the check of the arguments tells.
        if not isinstance(path, str) or path.startswith("~"):
            continue
        if is_missing(path):
            yield Finding("error", f"{place}: {path} does not exist")
        elif is_left_to_the_hub(path):
            yield _left_to_the_hub(place, path)


def _left_to_the_hub(place: str, path: str) -> Finding:
    return Finding("note", f"{place}: {path} is no folder here, and is looked for on the hub")


def _named_to_axolotl(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "base_model", values["base_model"]
    for key in ("datasets", "test_datasets", "pretraining_dataset"):
        datasets = values.get(key)
        for index, dataset in enumerate(datasets if isinstance(datasets, list) else [datasets]):
            if isinstance(dataset, Mapping):
                path, files = dataset.get("path"), dataset.get("data_files") or []
                paths = [path]
                # Of a name on the hub, they are in that repository.
                if isinstance(path, str) and os.path.exists(path):
                    paths += [files] if isinstance(files, str) else list(files)
                yield from ((f"{key}[{index}]", each) for each in paths)
