"""What the two distributions hold, and what a package index is told of them."""

from __future__ import annotations

import email
import re
import subprocess
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import deft_plugin

from .conftest import ROOT


@pytest.fixture(scope="module")
def repository() -> set[str]:
    """The files of the repository, relative to it."""
    if not (ROOT / ".git").exists():
        pytest.skip("no repository to compare with: this is a source distribution")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(files.read(name))


def test_the_wheel_is_the_package_and_nothing_else(wheel: Path, repository: set[str]) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = {name for name in files.namelist() if ".dist-info/" not in name}
    assert names == {name for name in repository if name.startswith("deft_plugin/")}
    assert {"deft_plugin/py.typed", "deft_plugin/report/template/page.html.jinja"} <= names


def test_the_source_distribution_is_the_repository(
    source_distribution: Path, repository: set[str]
) -> None:
    with tarfile.open(source_distribution) as files:
        names = {Path(*Path(each.name).parts[1:]).as_posix() for each in files if each.isfile()}
    generated = {"PKG-INFO", "setup.cfg"}
    names = {name for name in names - generated if ".egg-info/" not in name}
    assert names - repository == set(), "in the distribution alone"
    assert repository - names == set(), "in the repository alone"


def test_the_index_is_told(metadata: Message) -> None:
    assert metadata["Name"] == "deft_plugin"
    assert metadata["Version"] == deft_plugin.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Summary"]
    assert metadata["Keywords"]
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_extras_ask_for_extras_that_exist(metadata: Message) -> None:
    provided = set(metadata.get_all("Provides-Extra", []))
    own = [
        requirement
        for requirement in map(Requirement, metadata.get_all("Requires-Dist", []))
        if re.sub("[-_.]+", "-", requirement.name) == "deft-plugin"
    ]
    assert own
    for requirement in own:
        assert requirement.extras <= provided, requirement
