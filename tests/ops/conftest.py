"""Fixtures of the core's tests."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from deft_plugin.ops import availability

from .cases import DEVICE


@pytest.fixture(scope="session", autouse=True)
def _interpreter_knows_its_language() -> Iterator[None]:
    """Triton's interpreter looks through all of its language at every call in a kernel, which is nearly half of its time."""
    if DEVICE.type != "cpu" or not find_spec("triton"):
        yield
        return
    from triton.language import core
    from triton.runtime import interpreter

    @functools.cache
    def builtins(part: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(part) if core.is_builtin(member)]

    def replace_builtins(part: Any, builder: Any, scope: Any) -> None:
        for name in builtins(part):
            member = getattr(part, name)
            # What a call around this one has not replaced.
            if core.is_builtin(member):
                interpreter._patch_attr(part, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", replace_builtins)
        yield


@pytest.fixture(params=[True, False], ids=["hopper", "blackwell"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Launches on a CPU, with and without the products that take strips; a GPU has the launches themselves."""
    if DEVICE.type != "cpu":
        pytest.skip("not on a GPU")
    pytest.importorskip("triton")
    from . import quack_emulation

    monkeypatch.setitem(sys.modules, "deft_plugin.ops.quack_kernels", quack_emulation)
    monkeypatch.setattr(quack_emulation, "HAS_STRIPS", request.param)
    monkeypatch.setattr(availability, "_quack_obstacles", lambda device: [])
    return quack_emulation
