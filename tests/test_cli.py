"""The command `deft`: its commands, one style of errors, and a start without torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points

import pytest

import deft_plugin
from deft_plugin import cli
from deft_plugin.cli import errors

COMMANDS = ("sft", "objectives", "doctor", "report", "plot", "benchmark")
HEAVY = ("torch", "transformers", "trl", "datasets", "matplotlib", "numpy")
# Of `deft sft` TRL's parser says what there is.
OWN_HELP = COMMANDS[1:]


@pytest.mark.parametrize("command", [[], *([name] for name in OWN_HELP)], ids=str)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    script = (
        "import sys\n"
        "from deft_plugin.cli import main\n"
        f"main([*{command!r}, '--help'])\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"Usage: {' '.join(['deft', *command])}")
    assert process.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("command", OWN_HELP)
def test_help_says_what_a_command_does_and_has_an_example(
    command: str, deft: Callable[..., tuple[int, str, str]]
) -> None:
    status, text, _ = deft(command, "--help")
    assert status == 0
    assert re.search(rf"^      deft {command}", text, re.MULTILINE)
    assert text == deft(command, "-h")[1]


def test_the_commands_are_listed(deft: Callable[..., tuple[int, str, str]]) -> None:
    listed = deft("--help")[1].partition("Commands:")[2]
    assert tuple(line.split()[0] for line in listed.strip().splitlines()) == COMMANDS
    assert "..." not in listed


def test_the_version(deft: Callable[..., tuple[int, str, str]]) -> None:
    assert deft("--version") == (0, f"deft_plugin {deft_plugin.__version__}\n", "")


def test_the_installed_command_is_this_one() -> None:
    (point,) = entry_points(group="console_scripts", name="deft")
    assert point.load() is cli.main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "--fix"], "deft doctor: No such option"),
        (["objectives", "nll"], "deft objectives: Got unexpected extra argument"),
        (["plot"], "deft plot: Missing argument"),
        (["--nope"], "deft: No such option"),
        (["report", "--rows", "0"], "deft report: --rows '0': "),
        (["report", "--rows=many"], "deft report: --rows 'many': "),
        (["benchmark", "--masked", "1"], "deft benchmark: --masked '1': "),
        (["report", "m", "--rows"], "deft report: Option '--rows' requires an argument"),
    ],
    ids=str,
)
def test_wrong_use_is_told_in_a_line_with_the_value(
    arguments: list[str], message: str, deft: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, said = deft(*arguments)
    assert (status, out) == (2, "")
    assert said.startswith(message)
    for argument in arguments:
        assert argument.partition("=")[0 if argument.startswith("-") else 2] in said
    assert said.count("\n") == 1
    assert said.endswith(f"See {message.partition(':')[0]} --help.\n")


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["sft", "--loss_type", "deft"], "peft", "trl"),
        (["report", "m", "--data", "d"], "jinja2", "report"),
        (["plot", "run"], "matplotlib", "report"),
        (["benchmark", "m", "--output", "o"], "matplotlib", "report"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    arguments: list[str],
    package: str,
    extra: str,
    deft: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == package else object())
    status, _, said = deft(*arguments)
    assert status == 2
    assert said == f'deft {arguments[0]}: needs {package}: pip install "deft_plugin[{extra}]"\n'


def test_a_broken_pipe_that_is_not_the_output_is_no_quiet_end() -> None:
    with pytest.raises(BrokenPipeError), errors.may_be_cut_short():
        raise BrokenPipeError("a worker's")


def test_an_interrupt_has_the_status_of_one(
    monkeypatch: pytest.MonkeyPatch, deft: Callable[..., tuple[int, str, str]]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deft_plugin.objectives.objective_names", interrupt)
    assert deft("objectives")[0] == 130


def test_list_of_objectives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["deft", "objectives"])
    cli.main()
    listed = capsys.readouterr().out
    assert [name for name in deft_plugin.objective_names() if f"{name} " not in listed] == []
    assert "floor_coefficient=0.5" in listed
    assert "scope='auto' (or 'ema', 'global', 'micro_batch', 'fixed')" in listed
    assert "entropy='top_k' (or 'full')" in listed
    assert "decay=None (or a number)" in listed


def test_a_reader_that_has_read_enough_ends_the_list_quietly() -> None:
    command = [sys.executable, "-m", "deft_plugin.cli", "objectives"]
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize("argument", [[], ["--help"]])
def test_help(
    argument: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["deft", *argument])
    cli.main()
    assert "deft sft" in capsys.readouterr().out


def test_unknown_command_names_the_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["deft", "dpo"])
    with pytest.raises(SystemExit) as exit_of_command:
        cli.main()
    assert exit_of_command.value.code == 2
    assert "'dpo'. Choices: sft, objectives" in capsys.readouterr().err
