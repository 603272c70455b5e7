"""What the Makefile relies on where it leaves tests to one line of versions."""

from __future__ import annotations

import re

from .conftest import ROOT


def constraints(line: str) -> dict[str, str]:
    text = (ROOT / "constraints" / f"{line}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.M))


def test_trainers_and_heads_under_axolotl_are_the_floors() -> None:
    axolotl, floor = constraints("axolotl"), constraints("floor")
    for package in ("trl", "peft", "accelerate"):
        assert axolotl[package] == floor[package]
    assert axolotl["transformers"].split(".")[:2] == floor["transformers"].split(".")[:2]
