"""YAMLs of Axolotl, through all that Axolotl itself does to them before it loads data and model."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..objectives import build_objective
from .axolotl_keys import unknown_keys
from .data_files import DATA_KEYS, missing_files
from .finding import Finding, quiet
from .loss import device_here, path_problems
from .packages import is_installed

AXOLOTL_PLUGIN = "deft_plugin.axolotl.DEFTPlugin"
# What computes an attention, by Axolotl's name for it.
_FLASH = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}
# The class may be named by the module that defines it too.
_AXOLOTL_PLUGINS = (AXOLOTL_PLUGIN, "deft_plugin.axolotl.plugin.DEFTPlugin")


def check_axolotl(values: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether `axolotl train` would train with an objective from this content."""
    if not is_installed("axolotl"):
        yield Finding("error", "is an Axolotl file, and axolotl is not installed here")
        return
    problem = _no_configuration(values)
    if problem:
        yield Finding("error", problem)
        return
    if "" not in sys.path and os.getcwd() not in sys.path:
        # For `deft.module`: `axolotl train` finds modules in the working directory too.
        sys.path.insert(0, os.getcwd())
    from pydantic import ValidationError

    try:
        with quiet():
            cfg, changes = validate_as_axolotl(values)
    except ValidationError as error:
        yield from (Finding("error", text) for text in _messages(error))
        return
    except Exception as error:
        yield Finding("error", str(error))
        return
    yield from (Finding("note", change) for change in changes)
    from ..axolotl.args import DEFTSettings

    core, _, parameters = DEFTSettings(**(cfg.deft or {})).split()
    texts = [
        *_deepspeed_problems(values.get("deepspeed")),
        *path_problems(core.path, device_here()),
    ]
    found = [
        *unknown_keys(values),
        *missing_files(values),
        *(Finding("error", text) for text in texts),
    ]
    yield from found
    if values.get("processor_type") and not is_installed("torchvision"):
        yield Finding(
            "note",
            f"processor_type: {values['processor_type']}: its image processor may need torchvision, which is not "
            'installed here: pip install "deft_plugin[vision]"',
        )
    attention = cfg.attn_implementation
    if attention in _FLASH and not is_installed(_FLASH[attention]):
        yield Finding(
            "note",
            f"attn_implementation: {attention} may need {_FLASH[attention]} where it trains, which is not installed here",
        )
    if not any(finding.level == "error" for finding in found):
        yield Finding("ok", f"trains with {build_objective(cfg.deft_objective, parameters)!r}")


def _no_configuration(values: Mapping[str, Any]) -> str | None:
    """Why Axolotl could not even load the plugins, or would train without this one."""
    plugins = values.get("plugins") or []
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        return f"plugins: {plugins!r} is not a list of names"
    for key in DATA_KEYS:
        datasets = values.get(key)
        is_list = isinstance(datasets, list) and all(isinstance(each, dict) for each in datasets)
        if datasets and not is_list:
            return f"{key}: {datasets!r} is not a list of mappings, each with a path"
    strange = [key for key in values if not isinstance(key, str)]
    if strange:
        return f"has keys that are no text: {strange}"
    if not {*plugins} & {*_AXOLOTL_PLUGINS}:
        return (
            f"plugins: {plugins} lacks {AXOLOTL_PLUGIN}: Axolotl would train with its own loss, and "
            "ignore deft_objective and deft"
        )
    return None


def validate_as_axolotl(
    values: Mapping[str, Any], machine: Mapping[str, Any] | None = None
) -> tuple[Any, list[str]]:
    """A YAML's content after all that `axolotl train` does to it before it loads data and model.

    Args:
        values: the content.
        machine: what Axolotl finds out about the GPU (`axolotl.cli.config.gpu_capabilities`), by default this
            machine's.

    Returns:
        The configuration, and what this plugin has changed in it.

    Raises:
        Exception: what Axolotl or a plugin raises.
    """
    from axolotl.cli.config import gpu_capabilities
    from axolotl.integrations.base import PluginManager, load_plugin
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    from ..axolotl.adjustments import adjust
    from ..axolotl.args import is_listed

    cfg = DictDefault(copy.deepcopy(dict(values)))
    manager = PluginManager.get_instance()
    manager.plugins.clear()
    for name in values.get("plugins") or []:
        try:
            manager.plugins[name] = load_plugin(name)
        except Exception as error:
            raise ImportError(f"plugin {name} cannot be imported: {error}") from error
    # The plugin's own register() does so too, and prints it.
    changes = [*adjust(cfg)] if is_listed(cfg) else []
    for plugin in manager.plugins.values():
        plugin.register(cfg)
    capabilities, environment = gpu_capabilities()
    valid = validate_config(
        cfg, capabilities=dict(machine or capabilities), env_capabilities=environment
    )
    for name in {*manager.plugins} & {*_AXOLOTL_PLUGINS}:
        manager.plugins[name].pre_model_load(valid)
    return valid, changes


def _messages(error: Any) -> Iterator[str]:
    """What is wrong, a line each, of a pydantic.ValidationError."""
    for part in error.errors():
        place = ".".join(map(str, part["loc"]))
        for line in part["msg"].removeprefix("Value error, ").splitlines():
            text = line.removeprefix("deft_plugin: ").strip()
            given = "" if place == "" else f"{place}: {part['input']!r}: "
            yield f"{given}{text}"


def _deepspeed_problems(config: Any) -> list[str]:
    """What keeps Axolotl's `deepspeed`, a file or its content, from being used."""
    if not config:
        return []
    problems = (
        [] if is_installed("deepspeed") else ["deepspeed is set, and it is not installed here"]
    )
    if isinstance(config, str) and not config.lstrip().startswith("{"):
        try:
            json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            problems.append(f"deepspeed: {config} cannot be read: {error}")
    return problems
