"""The configuration of a model that a user has named, or one line that says why there is none."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from transformers import AutoConfig, PreTrainedConfig


def config_of_model(name: str, option: str, *, or_adapter: bool = False) -> PreTrainedConfig:
    """The model's configuration; no weights are loaded.

    Args:
        name: a model's folder, or its name on the hub.
        option: what the user named it with, for messages.
        or_adapter: whether the option takes an adapter too, for messages.

    Raises:
        ValueError: there is no such model.
    """
    try:
        # Code that comes with it is not run; on a terminal transformers would ask.
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        kinds = "an adapter nor a model's folder" if or_adapter else "a model's folder"
        files = "config.json or adapter_config.json" if or_adapter else "config.json"
        raise ValueError(
            f"{option} {name!r} is neither {kinds} nor a model on the hub: {_why_none(name, error)}. Expected: a folder with "
            f"{files}, or a name on the hub such as 'Qwen/Qwen3-0.6B'."
        ) from None
    return config


def _why_none(name: str, error: Exception) -> str:
    """Why there is no configuration, without the hub's own long text."""
    if "trust_remote_code" in str(error):
        return "it has code of its own, which is not run here"
    path = Path(name)
    if path.is_dir():
        return _why_none_in(path, error)
    if path.is_file():
        return "it is a file that holds no model's configuration"
    causes = tuple(_causes(error))

    def is_due_to(kind: type[Exception]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if is_due_to(HFValidationError):
        return "there is no such folder"
    if is_due_to(GatedRepoError):
        return "the hub gives it only to those whom its owner lets in (hf auth login)"
    if is_due_to(RepositoryNotFoundError):
        return "the hub has none of that name, or keeps it private (hf auth login)"
    if is_due_to(LocalEntryNotFoundError):
        offline = "may not be asked (HF_HUB_OFFLINE is set)"
        state = offline if constants.HF_HUB_OFFLINE else "cannot be reached"
        return f"it was not downloaded before, and the hub {state}"
    # Of older versions of transformers, without the cause.
    if str(error).startswith("Can't load the configuration"):
        return (
            "it was not downloaded before, and the hub cannot be reached or has none of that name"
        )
    return _shortened(error)


def _why_none_in(folder: Path, error: Exception) -> str:
    if (folder / "config.json").is_file():
        return f"its config.json cannot be used ({_shortened(error)})"
    if not any(folder.iterdir()):
        return "the folder is empty"
    if (folder / "adapter_config.json").is_file():
        return (
            "the folder has an adapter, and no config.json: name the model that the adapter is for"
        )
    return "the folder has no config.json"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _shortened(error: Exception) -> str:
    return textwrap.shorten(str(error), 160).rstrip(".")
