"""The package's rooms: one direction of imports, no circles, no file that is too long to read in one go."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import deft_plugin

PACKAGE = Path(deft_plugin.__file__).parent
# A room uses those before it; trainers' adapters and commands use them all.
ROOMS = ("objectives", "ops", "head")
LONGEST_FILE = 400


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """The package's modules that a module imports, also inside its functions."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            # `from . import fold` is of a module, `from .fold import fold_` of a name in one.
            parts = {f"{source}.{alias.name}" for alias in node.names}
            found |= parts if parts <= FILES.keys() else parts | {source}
    return found & FILES.keys() - {name}


def room_of(name: str) -> str:
    """The part of the package; an empty name for the package itself."""
    return name.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_those_before_it_alone(room: str) -> None:
    allowed = ROOMS[: ROOMS.index(room) + 1]
    modules = [name for name in FILES if room_of(name) == room]
    assert modules
    strange = {
        name: sorted(other for other in imports_of(name) if room_of(other) not in allowed)
        for name in modules
    }
    assert not {name: others for name, others in strange.items() if others}


def test_imports_go_in_no_circle() -> None:
    graph = {name: imports_of(name) for name in FILES}
    assert sum(map(len, graph.values())) > len(graph)
    # Raises CycleError, with the circle.
    TopologicalSorter(graph).prepare()


def test_no_file_is_too_long_to_read_in_one_go() -> None:
    lengths = {name: len(FILES[name].read_text().splitlines()) for name in FILES}
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE}
