"""What is installed and what it runs on."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator

import deft_plugin

from ..ops.availability import resolve_path
from .axolotl import AXOLOTL_PLUGIN
from .finding import Finding, quiet
from .loss import check_loss, device_here
from .packages import check_versions, is_installed


def check_environment() -> Iterator[Finding]:
    """Versions against what this package asks for, the device, and the loss on it."""
    yield Finding("ok", f"deft_plugin {deft_plugin.__version__}")
    yield Finding("ok", f"Python {platform.python_version()}")
    yield from check_versions()
    device = device_here()
    path = resolve_path("auto", device)
    yield Finding("ok", f"device {device.type}: losses run on the {path} path")
    yield check_loss(device)
    if is_installed("axolotl"):
        try:
            with quiet():
                importlib.import_module("deft_plugin.axolotl")
        except Exception as error:
            yield Finding("error", f"{AXOLOTL_PLUGIN} cannot be imported: {error}")
        else:
            yield Finding("ok", f"Axolotl can import {AXOLOTL_PLUGIN}")
