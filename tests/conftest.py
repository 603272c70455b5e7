"""Shared by all tests: one thread per process, no hub."""

import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What DeepSpeed compiles, apart for each environment: two versions of it do not share.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
if not torch.cuda.is_available():
    # Before anything imports Triton: kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each worker begins with its part of what takes long, or one is left with it at the end."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    others = [item for item in items if not item.get_closest_marker("slow")]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ends = [len(others) * worker // workers for worker in range(workers + 1)]
    # `--dist worksteal` deals the list out in as many pieces.
    items[:] = [
        item
        for worker, (begin, end) in enumerate(itertools.pairwise(ends))
        for item in (*slow[worker::workers], *others[begin:end])
    ]


@pytest.fixture(scope="session", autouse=True)
def _imports_are_not_garbage() -> Iterator[None]:
    """Trainers and DeepSpeed collect garbage many times, and would spend it on what imports have left behind."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def own_objectives() -> Iterator[None]:
    """What a test registers is gone after it."""
    from deft_plugin.objectives import registry

    built_in = dict(registry._OBJECTIVES)
    yield
    registry._OBJECTIVES.clear()
    registry._OBJECTIVES.update(built_in)


@pytest.fixture
def trl_as_it_was() -> Iterator[None]:
    """TRL's own classes are not extended after a test; the doctor registers the objectives with them."""
    import deft_plugin

    yield
    deft_plugin.unregister()


@pytest.fixture
def deft(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: its exit status, what it says on stdout and on stderr."""
    from deft_plugin import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        status = 0
        try:
            cli.main([*map(str, arguments)])
        except SystemExit as end:
            status = int(end.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run
