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
# One process of the installed package: its command and arguments; what it printed.
Run = Callable[..., str]


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


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which sees this one's packages behind its own."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder)]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture
def run(environment: Path, tmp_path: Path) -> Run:
    """Run a program of the environment outside any checkout; fail unless it ends with status 0."""

    def of_the_wheel(program: str, *arguments: str) -> str:
        hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
        variables = {name: value for name, value in os.environ.items() if name not in hidden}
        result = subprocess.run(
            [environment / "bin" / program, *arguments],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return of_the_wheel
