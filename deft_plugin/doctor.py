"""`deft doctor`: whether an environment can train with objectives, and whether a YAML will.

deft doctor                       # versions, device, and the loss against its definition
deft doctor run.yaml other.yaml   # also checks YAML files of Axolotl or `trl sft`, without loading a model

Axolotl only logs a plugin that it cannot import, ignores keys that it does not know, and then trains with its
own loss. Here each of those is an error, and the exit status is 1.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import io
import json
import logging
import os
import platform
import sys
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from packaging.requirements import Requirement

from .objectives import build_objective
from .ops import linear_gated_loss
from .ops.availability import resolve_path

AXOLOTL_PLUGIN = "deft_plugin.axolotl.DEFTPlugin"
# The class may be named by the module that defines it too.
_AXOLOTL_PLUGINS = (AXOLOTL_PLUGIN, "deft_plugin.axolotl.plugin.DEFTPlugin")
# Extras of this package whose requirements are those of a trainer.
TRAINER_EXTRAS = ("trl", "qlora", "axolotl", "deepspeed")
_DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".txt", ".gz", ".zst")


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
    device = _device()
    path = resolve_path("auto", device)
    yield Finding("ok", f"device {device.type}: losses run on the {path} path")
    yield _check_loss(device)
    if _installed("axolotl"):
        try:
            with quiet():
                importlib.import_module("deft_plugin.axolotl")
        except Exception as error:
            yield Finding("error", f"{AXOLOTL_PLUGIN} cannot be imported: {error}")
        else:
            yield Finding("ok", f"Axolotl can import {AXOLOTL_PLUGIN}")


def _device() -> torch.device:
    # PyTorch built for a GPU names it also where there is none.
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


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
    hidden = torch.randn(48, 32, generator=generator)
    weight = torch.randn(1000, 32, generator=generator)
    targets = torch.randint(1000, (48,), generator=generator)

    def run(path: Literal["auto", "reference"]) -> list[torch.Tensor]:
        inputs = [tensor.to(device, copy=True).requires_grad_() for tensor in (hidden, weight)]
        loss = linear_gated_loss(inputs[0], inputs[1], targets.to(device), "deft", path=path).loss
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
        yield from _check_trl(path, values)
    else:
        yield Finding(
            "error", "has neither base_model (Axolotl) nor model_name_or_path (trl sft) in it"
        )


def _check_axolotl(values: Mapping[str, Any]) -> Iterator[Finding]:
    if not _installed("axolotl"):
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
    from .axolotl.args import DEFTSettings

    core, _, parameters = DEFTSettings(**(cfg.deft or {})).split()
    texts = [
        *_missing_files(values),
        *_deepspeed_problems(values.get("deepspeed")),
        *_path_problems(core.path, _device()),
    ]
    found = [*unknown_keys(values), *(Finding("error", text) for text in texts)]
    yield from found
    if values.get("processor_type") and not _installed("torchvision"):
        yield Finding(
            "note",
            f"processor_type: {values['processor_type']}: its image processor may need torchvision, which is not "
            'installed here: pip install "deft_plugin[vision]"',
        )
    if not any(finding.level == "error" for finding in found):
        yield Finding("ok", f"trains with {build_objective(cfg.deft_objective, parameters)!r}")


def _no_configuration(values: Mapping[str, Any]) -> str | None:
    """Why Axolotl could not even load the plugins, or would train without this one."""
    plugins = values.get("plugins") or []
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        return f"plugins: {plugins!r} is not a list of names"
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

    from .axolotl.adjustments import adjust
    from .axolotl.args import is_listed

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
    problems = [] if _installed("deepspeed") else ["deepspeed is set, and it is not installed here"]
    if isinstance(config, str) and not config.lstrip().startswith("{"):
        try:
            json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            problems.append(f"deepspeed: {config} cannot be read: {error}")
    return problems


def _path_problems(path: str, device: torch.device) -> list[str]:
    """What keeps the loss from being computed on this path here."""
    try:
        resolve_path(path, device)
    except ValueError as error:
        return [f"On this machine, {error}"]
    return []


def unknown_keys(values: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys of an Axolotl YAML, nested ones too, that neither Axolotl nor its registered plugins know.

    Axolotl ignores them. An error where one looks misspelt; others may be left over from earlier versions.
    """
    from axolotl.integrations.config import merge_input_args

    from .axolotl.adjustments import CROSS_ENTROPIES

    known = merge_input_args()[0]
    unlisted = [key for key in CROSS_ENTROPIES if key in values and key not in known.model_fields]
    for key in unlisted:
        yield Finding(
            "note",
            f"Axolotl ignores the key {key!r}, which needs its plugin, and the gated head needs neither",
        )
    values = {key: value for key, value in values.items() if key not in unlisted}
    yield from _unknown(values, [known], "")


def _unknown(values: Any, models: Sequence[Any], place: str) -> Iterator[Finding]:
    """Keys below `place` that none of these pydantic models has."""
    if isinstance(values, list):
        for index, value in enumerate(values):
            yield from _unknown(value, models, f"{place.removesuffix('.')}[{index}].")
    # A model that takes any keys checks them itself.
    elif isinstance(values, Mapping) and not any(
        model.model_config.get("extra") == "allow" for model in models
    ):
        fields: dict[str, list[Any]] = {}
        for model in models:
            for name, field in model.model_fields.items():
                for key in filter(None, (name, field.alias)):
                    fields.setdefault(key, []).append(field.annotation)
        for key, value in values.items():
            if key in fields:
                nested = [*_models_in(fields[key])]
                yield from _unknown(value, nested, f"{place}{key}.") if nested else ()
            else:
                close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.75)
                text = f"Axolotl ignores the key {place + str(key)!r}, which it does not know"
                if close:
                    yield Finding("error", f"{text}. Did you mean {close[0]!r}?")
                else:
                    yield Finding("note", text)


def _models_in(annotations: Iterable[Any]) -> Iterator[Any]:
    """The pydantic models that a field may hold; none where it may hold a dict of anything."""
    from pydantic import BaseModel

    parts = [part for annotation in annotations for part in (annotation, *_parts_of(annotation))]
    if not any(part is dict or typing.get_origin(part) is dict for part in parts):
        yield from (part for part in parts if inspect.isclass(part) and issubclass(part, BaseModel))


def _parts_of(annotation: Any) -> Iterator[Any]:
    for part in typing.get_args(annotation):
        yield part
        yield from _parts_of(part)


def _missing_files(values: Mapping[str, Any]) -> Iterator[str]:
    """Files and folders that are named and not there; what may be a name on the hub cannot be told."""
    if _is_missing(values["base_model"]):
        yield f"base_model: {values['base_model']} does not exist"
    for key in ("datasets", "test_datasets", "pretraining_dataset"):
        datasets = values.get(key)
        for index, dataset in enumerate(datasets if isinstance(datasets, list) else [datasets]):
            if isinstance(dataset, Mapping):
                path, files = dataset.get("path"), dataset.get("data_files") or []
                paths = [path]
                # Of a name on the hub, they are in that repository.
                if isinstance(path, str) and os.path.exists(path):
                    paths += [files] if isinstance(files, str) else list(files)
                yield from (
                    f"{key}[{index}]: {path} does not exist" for path in paths if _is_missing(path)
                )


def _is_missing(path: Any) -> bool:
    """Whether this is no name on the hub, owner/name, and no address, but a path with nothing there."""
    if not isinstance(path, str) or "://" in path or any(mark in path for mark in "*?["):
        return False
    may_be_name = path.count("/") <= 1 and not path.startswith((".", "/", "~"))
    is_path = not may_be_name or Path(path).suffix in _DATA_SUFFIXES
    return is_path and not os.path.exists(path)


def _check_trl(path: Path, values: Mapping[str, Any]) -> Iterator[Finding]:
    if not _installed("trl"):
        yield Finding("error", "is a file of `trl sft`, and trl is not installed here")
        return
    with quiet():
        from trl.scripts import sft

        from .trl import register
        from .trl.config import objective_of

        register()
        parser = sft.make_parser(prog="deft sft")
    problems = [*_unknown_trl_keys(values, parser)]
    loss_type = values.get("loss_type", parser.get_default("loss_type"))
    loss = SimpleNamespace(loss_type=loss_type, loss_kwargs=values.get("loss_kwargs"))
    # The other keys are checked with a loss that is right.
    flags = ["--loss_type", "deft", "--loss_kwargs", "{}"]
    try:
        objective = objective_of(loss)
    except ValueError as error:
        problems.append(str(error))
    else:
        flags = []
        if objective is None:
            problems.append(f"loss_type={loss_type!r} is TRL's own loss")
    problems += _trl_problems(parser, ["--config", str(path), *flags], loss_type)
    yield from (Finding("error", problem) for problem in problems)
    if not problems:
        yield Finding("ok", f"trains with {objective!r} under `deft sft`")


def _unknown_trl_keys(values: Mapping[str, Any], parser: Any) -> Iterator[str]:
    # TrlParser itself takes env.
    known = {field.name for cls in parser.dataclass_types for field in dataclasses.fields(cls)}
    for key in values:
        if key not in {*known, "env"}:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.75)
            guess = f" Did you mean {close[0]!r}?" if close else ""
            yield f"unknown key {key!r}, which `trl sft` refuses.{guess}"


def _trl_problems(parser: Any, arguments: list[str], loss_type: Any) -> list[str]:
    """What `deft sft` would refuse in its arguments, apart from keys that it does not know."""
    from trl import ModelConfig, get_peft_config

    from .trl.config import objective_of, settings_of
    from .trl.conflicts import find_conflicts

    errors = io.StringIO()
    try:
        with quiet(), contextlib.redirect_stderr(errors):
            parsed = parser.parse_args_and_config(args=arguments, fail_with_unknown_args=False)
            training = next(part for part in parsed if hasattr(part, "loss_type"))
            if objective_of(training) is None:
                return []
            model = next(part for part in parsed if isinstance(part, ModelConfig))
            return [
                *_path_problems(settings_of(training)[0].path, training.device),
                *find_conflicts(training, get_peft_config(model), loss_type),
            ]
    except (Exception, SystemExit) as error:
        # The parser writes its usage first, and what is wrong in the last line.
        return [(errors.getvalue().strip().splitlines() or [str(error)])[-1]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what imports and validation log out of the report."""
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
