"""What `make dist` has built, and an environment that has deft_plugin from its wheel alone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import deft_plugin

ROOT = Path(__file__).parents[2]
# A program of the installed package and its arguments; what it printed.
Run = Callable[..., str]


def outside(folder: Path, *command: str | Path) -> str:
    """What a command prints that sees no checkout; fail unless it ends with status 0."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    result = subprocess.run(
        command,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in hidden},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _built(pattern: str) -> Path:
    name = pattern.format(deft_plugin.__version__)
    path = ROOT / "dist" / name
    assert path.is_file(), f"`make dist` builds dist/{name}"
    return path


@pytest.fixture(scope="session")
def wheel() -> Path:
    return _built("deft_plugin-{}-py3-none-any.whl")


@pytest.fixture(scope="session")
def source_distribution() -> Path:
    return _built("deft_plugin-{}.tar.gz")


def pip_of(environment: Path) -> list[str | Path]:
    """This environment's pip, at work in another, which has none."""
    return [sys.executable, "-m", "pip", "--python", environment]


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which sees this one's packages behind its own."""
    folder = tmp_path_factory.mktemp("environment")
    outside(folder, sys.executable, "-m", "venv", "--without-pip", folder)
    outside(folder, *pip_of(folder), "install", "-q", "--no-deps", "--no-index", wheel)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture
def run(environment: Path, tmp_path: Path) -> Run:
    """A program of the environment, in a folder of its own."""
    return lambda program, *arguments: outside(tmp_path, environment / "bin" / program, *arguments)
