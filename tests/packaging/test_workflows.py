"""The workflows do what the Makefile does: they have no commands of their own to go stale."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def steps_of(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def targets() -> set[str]:
    """What the Makefile can make by name."""
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.M)
    rules = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    assert set(phony.split()) == rules
    return rules


def test_the_workflows_are_there() -> None:
    assert {path.stem for path in WORKFLOWS} == {"docs", "kernels", "release", "tests"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_make_is_a_target_of_the_makefile(path: Path) -> None:
    text = path.read_text()
    # The matrix of a workflow lists targets too.
    matrix = yaml.safe_load(text)["jobs"]
    listed = [
        target
        for job in matrix.values()
        for target in job.get("strategy", {}).get("matrix", {}).get("target", [])
    ]
    made = [*re.findall(r"\bmake ([a-z-]+)", text), *listed]
    assert made
    assert set(made) <= targets()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_their_major_version(path: Path) -> None:
    used = [step["uses"] for step in steps_of(path) if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", action), action


def test_only_a_tag_is_released_and_only_what_was_tested() -> None:
    path = ROOT / ".github/workflows/release.yml"
    workflow = yaml.safe_load(path.read_text())
    # YAML 1.1 reads `on` as true.
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert "make package" in build["steps"][2]["run"]
    assert publish["needs"] == "build"
    # Trusted publishing: no password, but the right to say who one is, and that for this job alone.
    assert publish["permissions"] == {"id-token": "write"}
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets" not in path.read_text()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_report_has_what_the_doctor_says(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    (doctor,) = (part for part in form["body"] if part.get("id") == "doctor")
    assert "deft doctor" in doctor["attributes"]["label"]
    assert doctor["validations"] == {"required": True}


def test_there_is_a_form() -> None:
    assert [path.name for path in FORMS if path.name != "config.yml"] == ["bug.yml"]
