"""Versions that are installed, against what this package asks for."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from packaging.requirements import Requirement

from .finding import Finding

# Extras of this package whose requirements are those of a trainer.
TRAINER_EXTRAS = ("trl", "qlora", "axolotl", "deepspeed")


def is_installed(name: str) -> bool:
    """Whether a distribution of this name is installed."""
    return _version(name) is not None


def check_versions() -> Iterator[Finding]:
    """Each requirement of this package and of its trainers' extras; an error where a version does not fit."""
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
