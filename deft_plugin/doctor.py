"""`deft doctor`: whether an environment can train with objectives, and whether a YAML will.

deft doctor                       # versions, device, and the loss against its definition
deft doctor run.yaml other.yaml   # also checks YAML files of Axolotl or `trl sft`, without loading a model

Axolotl only logs a plugin that it cannot import, ignores keys that it does not know, and then trains with its
own loss. Here each of those is an error, and the exit status is 1.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement

from .objectives import build_objective
from .ops import linear_gated_loss
from .ops.availability import chooses_triton

AXOLOTL_PLUGIN = "deft_plugin.axolotl.DEFTPlugin"
# Extras of this package whose requirements are those of a trainer.
TRAINER_EXTRAS = ("trl", "qlora", "axolotl", "deepspeed")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "note", "error"]
    text: str


def main(arguments: Sequence[str]) -> None:
    """Print the report; exit with status 1 when it has an error."""
    if any(argument.startswith("-") for argument in arguments):
        print("usage: deft doctor [YAML of Axolotl or `trl sft` ...]")
        raise SystemExit(0 if {"-h", "--help"} & {*arguments} else 2)
    failed = _report("environment", check_environment())
    for path in arguments:
        failed |= _report(path, check_yaml(Path(path)))
    raise SystemExit(failed)


def _report(title: str, findings: Iterable[Finding]) -> bool:
    print(title, flush=True)
    failed = False
    for finding in findings:
        print(f"  {finding.level:5}  {finding.text}", flush=True)
        failed |= finding.level == "error"
    return failed


def check_environment() -> Iterator[Finding]:
    """Versions against what this package asks for, the device, and the loss on it."""
    yield Finding("ok", f"Python {platform.python_version()}")
    yield from _check_versions()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    path = "triton" if chooses_triton("auto", device) else "chunked"
    yield Finding("ok", f"device {device.type}: losses run on the {path} path")
    yield _check_loss(device)
    if _installed("axolotl"):
        try:
            with _quiet():
                importlib.import_module("deft_plugin.axolotl")
        except Exception as error:
            yield Finding("error", f"{AXOLOTL_PLUGIN} cannot be imported: {error}")
        else:
            yield Finding("ok", f"Axolotl can import {AXOLOTL_PLUGIN}")


def _check_versions() -> Iterator[Finding]:
    for text in importlib.metadata.requires("deft_plugin") or []:
        requirement = Requirement(text)
        extra = next(
            (name for name in TRAINER_EXTRAS if _belongs_to(requirement, name)),
            None if requirement.marker else "",
        )
        if extra is None or requirement.name == "deft_plugin":
            continue
        version = _version(requirement.name)
        if version is None and extra:
            yield Finding(
                "note", f"{requirement.name} is not installed; it comes with the extra [{extra}]"
            )
        elif version is None or not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            yield Finding("error", f"{requirement.name} is {version}, and {wanted} is needed")
        else:
            yield Finding("ok", f"{requirement.name} {version}")


def _belongs_to(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _installed(name: str) -> bool:
    return _version(name) is not None


def _check_loss(device: torch.device) -> Finding:
    """The fused loss and its gradients on `device` against the definition on full logits."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(48, 32, generator=generator).to(device)
    weight = torch.randn(1000, 32, generator=generator).to(device)
    targets = torch.randint(1000, (48,), generator=generator).to(device)

    def run(path: Literal["auto", "reference"]) -> list[torch.Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        loss = linear_gated_loss(inputs[0], inputs[1], targets, "deft", path=path).loss
        return [loss, *torch.autograd.grad(loss, inputs)]

    try:
        for actual, expected in zip(run("auto"), run("reference"), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    except Exception as error:
        return Finding("error", f"the loss differs from its definition on this device: {error}")
    return Finding("ok", "loss and gradients agree with the definition on full logits")


def check_yaml(path: Path) -> Iterator[Finding]:
    """Whether a training run with this file would train with an objective; nothing is loaded."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        yield Finding("error", f"cannot be read: {error}")
        return
    if not isinstance(values, dict):
        yield Finding("error", "is not a YAML mapping of keys to values")
    elif "base_model" in values:
        yield from _check_axolotl(values)
    elif "model_name_or_path" in values:
        yield from _check_trl(path)
    else:
        yield Finding(
            "error", "has neither base_model (Axolotl) nor model_name_or_path (trl sft) in it"
        )


def _check_axolotl(values: Mapping[str, Any]) -> Iterator[Finding]:
    if not _installed("axolotl"):
        yield Finding("error", "is an Axolotl file, and axolotl is not installed here")
        return
    plugins = values.get("plugins") or []
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        yield Finding("error", f"plugins: {plugins!r} is not a list of names")
        return
    if not all(isinstance(key, str) for key in values):
        strange = [key for key in values if not isinstance(key, str)]
        yield Finding("error", f"has keys that are no text: {strange}")
        return
    if AXOLOTL_PLUGIN not in plugins:
        yield Finding(
            "error",
            f"plugins: {plugins} lacks {AXOLOTL_PLUGIN}: Axolotl would train with its own loss, and "
            "ignore deft_objective and deft",
        )
        return
    with _quiet():
        from axolotl.cli.config import gpu_capabilities
        from axolotl.integrations.base import PluginManager, load_plugin
        from axolotl.utils.config import validate_config
        from axolotl.utils.dict import DictDefault

        from .axolotl.args import DEFTSettings

    if "" not in sys.path and os.getcwd() not in sys.path:
        # For `deft.module`: `axolotl train` finds modules in the working directory too.
        sys.path.insert(0, os.getcwd())
    cfg = DictDefault(dict(values))
    manager = PluginManager.get_instance()
    manager.plugins.clear()
    for name in plugins:
        try:
            with _quiet():
                manager.plugins[name] = load_plugin(name)
                manager.plugins[name].register(cfg)
        except Exception as error:
            yield Finding("error", f"plugin {name} cannot be imported: {error}")
            return
    capabilities, env_capabilities = gpu_capabilities()
    try:
        with _quiet():
            valid = validate_config(
                cfg, capabilities=capabilities, env_capabilities=env_capabilities
            )
    except Exception as error:
        yield Finding("error", str(error))
        return
    errors = [
        f"Axolotl ignores the key {key!r}, which it does not know" for key in ignored_keys(values)
    ]
    errors += _deepspeed_problems(values.get("deepspeed"))
    try:
        manager.plugins[AXOLOTL_PLUGIN].pre_model_load(valid)
    except ValueError as error:
        errors.append(str(error))
    yield from (Finding("error", error) for error in errors)
    if errors:
        return
    _, parameters = DEFTSettings(**(valid.deft or {})).split()
    yield Finding("ok", f"trains with {build_objective(valid.deft_objective, parameters)!r}")


def _deepspeed_problems(config: Any) -> list[str]:
    """What keeps Axolotl's `deepspeed`, a file or its content, from being used."""
    if not config:
        return []
    problems = [] if _installed("deepspeed") else ["deepspeed is set, and it is not installed here"]
    if isinstance(config, str) and not config.lstrip().startswith("{"):
        try:
            json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            problems.append(f"deepspeed: {config} cannot be read: {error}")
    return problems


def ignored_keys(values: Mapping[str, Any]) -> list[str]:
    """Keys of an Axolotl YAML that neither Axolotl nor its registered plugins know."""
    from axolotl.integrations.config import merge_input_args

    schema, _ = merge_input_args()
    known = set(schema.model_fields)
    known |= {field.alias for field in schema.model_fields.values() if field.alias}
    return [key for key in values if key not in known]


def _check_trl(path: Path) -> Iterator[Finding]:
    if not _installed("trl"):
        yield Finding("error", "is a file of `trl sft`, and trl is not installed here")
        return
    errors = io.StringIO()
    try:
        with _quiet(), contextlib.redirect_stderr(errors):
            from trl import ModelConfig, get_peft_config
            from trl.scripts import sft

            from .trl import register
            from .trl.config import HAS_FUSED_HEAD, objective_of
            from .trl.conflicts import check_settings

            register()
            parser = sft.make_parser(prog="deft sft")
            parsed = parser.parse_args_and_config(args=["--config", str(path)])
            arguments = next(part for part in parsed if hasattr(part, "loss_type"))
            objective = objective_of(arguments)
            if objective is not None:
                model = next(part for part in parsed if isinstance(part, ModelConfig))
                adapter = get_peft_config(model)
                check_settings(arguments, adapter, objective.name, not HAS_FUSED_HEAD)
    except (Exception, SystemExit) as error:
        # The parser writes its usage first, and what is wrong in the last line.
        lines = errors.getvalue().strip().splitlines() or [str(error)]
        yield Finding("error", lines[-1])
        return
    if objective is None:
        yield Finding("error", f"loss_type={arguments.loss_type!r} is TRL's own loss")
    else:
        yield Finding("ok", f"trains with {objective!r} under `deft sft`")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what imports and validation log out of the report."""
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
