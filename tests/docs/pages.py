"""What README and docs hold, read as Markdown: pieces of code, commands, links, headings."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# What a command begins with; `scripts/train.py --loss-type p` is one too.
PROGRAMS = (
    "accelerate", "axolotl", "deft", "make", "pip", "pytest", "python", "torchrun", "trl",
    ".venv/bin/python", ".venv-axolotl/bin/python",
)  # fmt: skip
SHELL = ("bash", "sh")

_FENCE = re.compile(r"^(?P<marks>```+)(?P<language>\w*)\n(?P<text>.*?)^(?P=marks)$", re.M | re.S)
_INDENTED = re.compile(r"(?:\A|\n\n)((?: {4}.*\n|\n(?= {4}))+)")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.*)$", re.M)
_COMMENT = re.compile(r"(^|\s\s+)# .*$")


@dataclass(frozen=True)
class Block:
    """A fenced block with its language, or an indented one with none."""

    page: Path
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a page, on one line and without its comment."""

    page: Path
    text: str


def blocks(page: Path) -> list[Block]:
    """All blocks of code of a page."""
    text = page.read_text()
    fenced = [Block(page, match["language"], match["text"]) for match in _FENCE.finditer(text)]
    indented = _INDENTED.findall(_FENCE.sub("", text))
    return [*fenced, *(Block(page, "", textwrap.dedent(each).strip()) for each in indented)]


def spans(page: Path) -> list[str]:
    """All pieces of code within sentences and tables."""
    return _SPAN.findall(_prose(page))


def commands() -> list[Command]:
    """Every command of every page: lines of blocks, and pieces of code that begin with a program."""
    found = []
    for page in PAGES:
        for block in blocks(page):
            if block.language in SHELL or not block.language:
                found += [Command(page, line) for line in _shell_lines(block)]
        found += [Command(page, span) for span in spans(page) if _is_command(span)]
    return found


def snippets() -> list[Block]:
    """Every piece of Python in a block."""
    of_pages = [block for page in PAGES for block in blocks(page)]
    return [
        block
        for block in of_pages
        if block.language == "python" or (not block.language and _is_python(block.text))
    ]


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures."""
    return _LINK.findall(re.sub(_SPAN, "", _prose(page)))


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as code hosts and this site make them."""
    titles = (match[1] for match in _HEADING.finditer(_FENCE.sub("", page.read_text())))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _prose(page: Path) -> str:
    return _INDENTED.sub("\n\n", _FENCE.sub("", page.read_text()))


def _shell_lines(block: Block) -> Iterator[str]:
    text = block.text.replace("\\\n", " ")
    if not block.language and _is_python(text):
        return
    loop: list[str] = []
    for line in text.splitlines():
        line = _COMMENT.sub("", line).strip()
        # Inside a loop `done` is no name of Python's.
        if not line or (not loop and not block.language and _is_setting(line)):
            continue
        # A loop over several lines is one command.
        loop.append(" ".join(line.split()))
        joined = " ".join(loop)
        if len(re.findall(r"\bdo\b", joined)) == len(re.findall(r"\bdone\b", joined)):
            yield joined
            loop.clear()


def _is_command(span: str) -> bool:
    program, *arguments = span.split(" ")
    return bool(arguments) and (
        program in PROGRAMS or re.fullmatch(r"scripts/\S+\.py", program) is not None
    )


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def _is_setting(line: str) -> bool:
    """A line of a YAML, or a call."""
    return re.match(r"\w+: ", line) is not None or _is_python(line)
