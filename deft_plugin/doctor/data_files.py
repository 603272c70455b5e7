"""Files and folders that a YAML names and that are not there; what may be a name on the hub cannot be told."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from ..paths import TILDE, has_nothing_here, is_left_to_the_hub, is_missing
from .finding import Finding

# Where an Axolotl YAML names data sets.
DATA_KEYS = ("datasets", "test_datasets", "pretraining_dataset")


def missing_files(values: Mapping[str, Any]) -> Iterator[Finding]:
    """What an Axolotl YAML names and is not there; a note on what begins with a folder here and may be on the hub."""
    named = [(key, values.get(key)) for key in ("base_model", "tokenizer_config", "lora_model_dir")]
    # Never on the hub.
    files = [("resume_from_checkpoint", values.get("resume_from_checkpoint"))]
    templates = [("chat_template_jinja", values.get("chat_template_jinja"))]
    for key in DATA_KEYS:
        for index, dataset in enumerate(values.get(key) or []):
            place, path = f"{key}[{index}]", dataset.get("path")
            # Of a name on the hub, they are in that repository.
            if _is_reader(path) or (isinstance(path, str) and os.path.exists(path)):
                files += [(place, each) for each in _data_files(dataset)]
            if not _is_reader(path):
                named.append((place, path))
            templates.append((f"{place}.chat_template_jinja", dataset.get("chat_template_jinja")))
    # A template itself has braces.
    files += [
        (place, text) for place, text in templates if isinstance(text, str) and "{" not in text
    ]
    for place, path in named:
        if not isinstance(path, str):
            continue
        if is_missing(path):
            yield _missing(place, path)
        elif is_left_to_the_hub(path) and os.path.isdir(os.path.dirname(path)):
            yield _left_to_the_hub(place, path)
    for place, path in files:
        if isinstance(path, str) and has_nothing_here(path):
            yield _missing(place, path)


def missing_files_of_trl(values: Mapping[str, Any]) -> Iterator[Finding]:
    """What a YAML of `trl sft` names and is not there, with a note on what may be on the hub."""
    keys = ("model_name_or_path", "dataset_name", "chat_template_path")
    named = [(key, values.get(key)) for key in keys]
    datasets = values.get("datasets")
    for index, dataset in enumerate(datasets if isinstance(datasets, list) else []):
        if not isinstance(dataset, Mapping):
            continue
        path, folder = dataset.get("path"), ""
        if not _is_reader(path):
            named.append((f"datasets[{index}].path", path))
            # Of a name on the hub, they are in that repository.
            if not isinstance(path, str) or not os.path.isdir(path):
                continue
            folder = path
        for file in _data_files(dataset):
            # As `datasets` looks for them.
            file = os.path.join(folder, str(dataset.get("data_dir") or ""), file)
            if has_nothing_here(file):
                yield _missing(f"datasets[{index}].data_files", file)
    for place, path in named:
        # Of ~ the check of the arguments tells.
        if not isinstance(path, str) or path.startswith("~"):
            continue
        if is_missing(path):
            yield _missing(place, path)
        elif is_left_to_the_hub(path):
            yield _left_to_the_hub(place, path)


def _missing(place: str, path: str) -> Finding:
    remedy = f" ({TILDE})" if path.startswith("~") else ""
    return Finding("error", f"{place}: {path} does not exist{remedy}")


def _left_to_the_hub(place: str, path: str) -> Finding:
    return Finding("note", f"{place}: {path} is no folder here, and is looked for on the hub")


def _is_reader(path: Any) -> bool:
    """Whether this is the name of what reads files in `datasets`: json, csv, parquet, imagefolder, ..."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return isinstance(path, str) and path in _PACKAGED_DATASETS_MODULES and not os.path.exists(path)


def _data_files(dataset: Mapping[Any, Any]) -> Iterator[str]:
    """The files that `data_files` names: one, a list, or either for each split."""
    pending = [dataset.get("data_files")]
    while pending:
        files = pending.pop(0)
        if isinstance(files, str):
            yield files
        elif isinstance(files, list | tuple):
            pending += files
        elif isinstance(files, Mapping):
            pending += files.values()
