"""What the plugin's one line does to each YAML of a folder, by default to all of Axolotl's own examples.

    make .venv-axolotl/.examples                                  # Axolotl, and its examples out of its source archive
    .venv-axolotl/bin/python scripts/axolotl_examples.py
    .venv-axolotl/bin/python scripts/axolotl_examples.py runs     # a folder of your own

Each file is validated as `axolotl train` does it before it loads data and model, as it is and with the one line added
and nothing else, both times as on eight H100 with the packages that Axolotl's extras install. Counted are the files that are
valid without the line and fine-tune a language model on labels. The home directory is an empty one meanwhile: Axolotl's
NeMo Gym plugin clones a repository into it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any
from unittest import mock

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
import yaml
from rich.console import Console

from deft_plugin.doctor.axolotl import AXOLOTL_PLUGIN, validate_as_axolotl
from deft_plugin.doctor.finding import quiet

MACHINE = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}
# Validation imports it, and does nothing with it; it is for GPUs.
PACKAGE = "ring_flash_attn"
# Keys of Axolotl's configuration that mean another kind of training.
OTHER_KINDS = ("rl", "reward_model", "process_reward_model", "kd_trainer", "diffusion")

console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Verdict:
    """What becomes of one file.

    Args:
        path: of the file.
        kind: "accepted", "refused", "another kind of training", "invalid without the line".
        reasons: what is switched off, or why not, in sentences.
    """

    path: Path
    kind: str
    reasons: tuple[str, ...] = ()


def judge(directory: Path) -> list[Verdict]:
    """The verdicts on a folder's YAMLs; files that they name are looked for in the folder above it."""
    directory = directory.resolve()
    sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
    is_available, torch.accelerator.is_available = torch.accelerator.is_available, lambda: True
    working_directory = Path.cwd()
    os.chdir(directory.parent)
    try:
        with (
            tempfile.TemporaryDirectory() as home,
            mock.patch.dict(os.environ, {"HOME": home}),
            schemas_built_once(),
        ):
            found = (_judge_file(path) for path in sorted(directory.rglob("*.y*ml")))
            return [verdict for verdict in found if verdict is not None]
    finally:
        os.chdir(working_directory)
        torch.accelerator.is_available = is_available
        del sys.modules[PACKAGE]


def _judge_file(path: Path) -> Verdict | None:
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict) or "base_model" not in values:
        return None  # Of a cloud's settings.
    try:
        own, _ = _validated(values)
    except Exception as error:
        return Verdict(path, "invalid without the line", (str(error),))
    if any(own.get(key) for key in OTHER_KINDS):
        return Verdict(path, "another kind of training")
    plugins = [*(values.get("plugins") or []), AXOLOTL_PLUGIN]
    try:
        _, changes = _validated({**values, "plugins": plugins})
    except Exception as error:
        return Verdict(path, "refused", (str(error),))
    return Verdict(path, "accepted", tuple(changes))


def _validated(values: dict[str, Any]) -> tuple[Any, list[str]]:
    with quiet():
        return validate_as_axolotl(values, MACHINE)


@contextlib.contextmanager
def schemas_built_once() -> Iterator[None]:
    """Axolotl builds its schema several times a file, a quarter of a second each; that of the same plugins is the same."""
    from axolotl.integrations import config
    from axolotl.integrations.base import PluginManager

    build = config.merge_input_args

    @functools.cache
    def built(_: tuple[str, ...]) -> Any:
        return build()

    def merge_input_args() -> Any:
        return built(tuple(PluginManager.get_instance().get_input_args()))

    users = (
        "axolotl.integrations.config",
        "axolotl.utils.config",
        "deft_plugin.axolotl.adjustments",
    )
    with contextlib.ExitStack() as patches:
        for module in users:
            patches.enter_context(mock.patch(f"{module}.merge_input_args", merge_input_args))
        yield


def share_accepted(verdicts: Iterable[Verdict]) -> float:
    """Accepted files as a share of all that count."""
    counts = Counter(verdict.kind for verdict in verdicts)
    return counts["accepted"] / max(counts["accepted"] + counts["refused"], 1)


def examples_of_axolotl() -> Path:
    """Where `make` has put the examples of the Axolotl that is installed here.

    Raises:
        FileNotFoundError: it has not.
    """
    found = sorted(Path(sys.prefix).glob("axolotl-*/examples"))
    if not found:
        raise FileNotFoundError(
            f"{sys.prefix} has no axolotl-*/examples: run make .venv-axolotl/.examples, or name a folder."
        )
    return found[-1]


def main(
    directory: Annotated[
        Path | None, typer.Argument(help="Folder of YAMLs, with the folders in it.")
    ] = None,
) -> None:
    """Print a line for each file, and the counts."""
    directory = (examples_of_axolotl() if directory is None else directory).resolve()
    verdicts = judge(directory)
    for verdict in verdicts:
        reason = " ".join(" ".join(verdict.reasons).split())
        name = verdict.path.relative_to(directory)
        console.print(f"{verdict.kind:24}  {name}  {reason}", markup=False)
    console.print()
    for kind, count in Counter(verdict.kind for verdict in verdicts).most_common():
        console.print(f"{count:4}  {kind}")
    changes = Counter(
        change for verdict in verdicts if verdict.kind == "accepted" for change in verdict.reasons
    )
    for change, count in changes.most_common():
        console.print(f"{count:4}  accepted, {change}")
    console.print(f"{share_accepted(verdicts):.1%} accepted of those that count")


if __name__ == "__main__":
    typer.run(main)
