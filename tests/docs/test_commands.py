"""Every command of README and docs is run by something, or it is said why not; its options and files are there."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import tomllib
import typer
from typer.testing import CliRunner

from deft_plugin import cli
from tests.docs.commands import RUN_BY, Form, Target, Test
from tests.docs.pages import ROOT, commands

# The scripts import each other by name.
sys.path.insert(0, str(ROOT / "scripts"))
COMMANDS = list(dict.fromkeys(command.text for command in commands()))
MAKEFILE = (ROOT / "Makefile").read_text()
# Folders and files of the repository that a command may name; what it makes is in others.
SHIPPED = ("axolotl_configs/", "constraints/", "deepspeed_configs/", "scripts/", "tests/")
DEFT = ("sft", "objectives", "doctor", "report", "plot", "benchmark")


def test_every_command_has_an_entry_and_every_entry_a_command() -> None:
    assert set(COMMANDS) - set(RUN_BY) == set(), "say in tests/docs/commands.py what runs it"
    assert set(RUN_BY) - set(COMMANDS) == set(), "no page has it any more"


def test_what_runs_them_is_there() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for command, run_by in RUN_BY.items():
        if isinstance(run_by, Test):
            assert f"\ndef {run_by.name}(" in tests, f"{command}: there is no {run_by.name}"
        elif isinstance(run_by, Target):
            assert f"\n{run_by.name}:" in MAKEFILE, f"{command}: make has no {run_by.name}"
        elif isinstance(run_by, Form):
            assert run_by.of in RUN_BY, command


@pytest.mark.parametrize("command", COMMANDS)
def test_its_program_options_and_files_are_there(command: str) -> None:
    if command.startswith(("for ", "mkdir ")):
        command = command[command.index("accelerate ") :] if "accelerate" in command else ""
    words = shlex.split(command.removesuffix(" done done"))
    for word in words:
        if word.startswith(SHIPPED) and "$" not in word:
            assert (ROOT / word).exists(), word
    while words:
        program, *arguments = words
        if program.endswith(".py"):
            words = _script(program, arguments)
        else:
            words = CHECKS[program.rpartition("/")[2]](arguments)


# Each returns what is left to check, a script or a module with its arguments.
def _make(arguments: list[str]) -> list[str]:
    for target in arguments:
        if "=" not in target:
            variable = re.sub(r"^\.venv-(\w+)/", lambda match: f"$({match[1].upper()})/", target)
            assert f"\n{variable}:" in MAKEFILE, f"make has no {target}"
    return []


def _pip(arguments: list[str]) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for argument in arguments:
        match = re.fullmatch(r"(?:\.|deft_plugin)\[(.*)\]", argument)
        for extra in match[1].split(",") if match else ():
            assert extra in project["optional-dependencies"], f"there is no extra {extra}"
    return []


def _python(arguments: list[str]) -> list[str]:
    """Also what is behind the options of `accelerate launch`."""
    for index, word in enumerate(arguments):
        if word.endswith(".py"):
            return arguments[index:]
        if word == "-m":
            assert find_spec(arguments[index + 1]) is not None, arguments[index + 1]
            return arguments[index + 1 :]
    return []


def _deft(arguments: list[str]) -> list[str]:
    name = arguments[0]
    if name != "COMMAND":
        assert name in DEFT
        _check_options(arguments[1:], _help_of_deft(name), f"deft {name}")
    return []


def _script(path: str, arguments: list[str]) -> list[str]:
    app = _app(path)
    chosen = arguments[:1] if len(app.registered_commands) > 1 else []
    _check_options(arguments, _help(app, *chosen), path)
    return []


def _others(arguments: list[str]) -> list[str]:
    """Another project's command; its files were looked at."""
    return []


@cache
def _app(path: str) -> typer.Typer:
    name = path.removeprefix("scripts/").removesuffix(".py").replace("/", ".")
    module: Any = pytest.importorskip(name, reason="needs the extra `scripts`, or `paper`")
    if hasattr(module, "app"):
        return module.app
    app = typer.Typer()
    app.command()(module.main)
    return app


def _help(app: typer.Typer, *arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    assert result.exit_code == 0, f"{arguments}: {result.output}"
    return result.output


@cache
def _help_of_deft(name: str) -> str:
    """What `deft NAME --help` prints; TRL's parser prints for `sft`."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("sys.argv", ["deft", name, "--help"])
        patch.setenv("COLUMNS", "300")
        with contextlib.suppress(SystemExit):
            cli.main()
    return printed.getvalue()


def _check_options(arguments: list[str], help_text: str, command: str) -> None:
    options = {word.partition("=")[0] for word in arguments if re.match(r"--[a-z]", word)}
    # TRL's parser takes --config and does not list it.
    for option in options - {"--help", "--config"}:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_text), f"{command} has no {option}"


CHECKS: dict[str, Callable[[list[str]], list[str]]] = {
    "accelerate": _python,
    "axolotl": _others,
    "deft": _deft,
    "deft_plugin.trl.sft": lambda arguments: _deft(["sft", *arguments]),
    "make": _make,
    "pip": _pip,
    "pytest": _others,
    "python": _python,
    "tests.head.model_table": _others,
    "tests.ops.ahead_of_time": _others,
    "tests.ops.quack_ahead_of_time": _others,
    "torchrun": _others,
    "trl": _others,
}


@pytest.mark.parametrize("name", DEFT)
def test_help_of_every_command_names_its_options(name: str) -> None:
    text = _help_of_deft(name)
    assert f"deft {name}" in text
    assert "--help" in text


def test_an_option_that_is_not_there_is_found() -> None:
    with pytest.raises(AssertionError, match="has no --loss_kind"):
        _deft(["sft", "--loss_kind", "deft"])
    with pytest.raises(AssertionError, match="there is no extra"):
        _pip(["install", ".[qloro]"])
    with pytest.raises(AssertionError, match="make has no"):
        _make(["demos"])
