"""Axolotl in this process: no telemetry, a tiny base model on disk, and plugins of one test at a time."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.scripts.conftest import SCRIPTS
from tests.tiny import tiny_model, tiny_tokenizer

__all__ = ["SCRIPTS"]

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"

collect_ignore_glob = [] if find_spec("axolotl") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _imports_are_not_garbage() -> Iterator[None]:
    """Axolotl collects garbage four times a run, and spends it on what its imports left behind."""
    import axolotl.train  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _schemas_are_built_once() -> Iterator[None]:
    """What most of a validation's time goes into."""
    from axolotl_examples import schemas_built_once

    with schemas_built_once():
        yield


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with a tokenizer, as `base_model:` names it."""
    path = tmp_path_factory.mktemp("base_model")
    tiny_model("qwen3").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _own_plugins() -> Iterator[None]:
    """Axolotl keeps the plugins of every configuration that the process has seen."""
    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    manager.plugins.clear()
    yield
    manager.plugins.clear()
