"""The version stands in deft_plugin.__version__; files that repeat it agree, and the citation is whole."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

import deft_plugin

from .conftest import ROOT


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    return content


def test_the_newest_changes_are_this_versions() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    form = r"\[(\d+\.\d+\.\d+)\] - (unreleased|\d{4}-\d{2}-\d{2})"
    matches = [re.fullmatch(form, heading) for heading in headings]
    assert all(matches), headings
    versions = [match[1] for match in matches if match]
    assert versions[0] == deft_plugin.__version__
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert numbers == sorted({*numbers}, reverse=True)


def test_the_citation_is_of_this_version(citation: dict[str, Any]) -> None:
    assert citation["version"] == deft_plugin.__version__


def test_the_citation_has_what_the_format_asks_for(citation: dict[str, Any]) -> None:
    """Citation File Format 1.2.0: four fields, of a reference three, and persons or entities as authors."""
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[field] for field in ("authors", "message", "title"))
    assert citation["type"] == "software"
    (paper,) = citation["references"]
    assert all(paper[field] for field in ("authors", "title", "type"))
    assert [each["value"] for each in paper["identifiers"]] == ["arXiv:2602.11424"]
    for author in [*citation["authors"], *paper["authors"]]:
        assert {"name"} == author.keys() or {"given-names", "family-names"} <= author.keys()
