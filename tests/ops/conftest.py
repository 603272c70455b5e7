"""Fixtures of the core's tests."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from deft_plugin.ops import availability

from .cases import DEVICE


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
