"""How findings are printed: what was looked at, and below it a line for each, none of them broken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from .environment import check_environment
from .files import check_path
from .finding import Finding

_STYLES = {"ok": "green", "note": "yellow", "error": "bold red"}


def print_report(paths: Sequence[Path]) -> bool:
    """Print what is found in the environment, of which errors alone where there are paths, then in each of them; whether there is an error."""
    environment = check_environment()
    failed = _print("environment", _in_short(environment) if paths else environment)
    for path in paths:
        failed |= _print(str(path), check_path(path))
    return failed


def _in_short(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Findings that are errors, and a line for the rest."""
    rest = 0
    for finding in findings:
        if finding.level == "error":
            yield finding
        else:
            rest += 1
    yield Finding("ok", f"the rest ({rest} findings) is listed by `deft doctor` alone")


def _print(title: str, findings: Iterable[Finding]) -> bool:
    # Made here, since it takes the standard output that there is now.
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(title))
    failed = False
    for finding in findings:
        level = Text(f"  {finding.level:5}  ", style=_STYLES[finding.level])
        console.print(level.append(finding.text, style="not bold default"))
        failed |= finding.level == "error"
    return failed
