"""`deft report`: what the gates do to your data, as one page.

A model and a data set go in; where the data stands for the model, which tokens each objective would silence, what a training run
has changed, and several runs side by side come out. From rows to page, one idea a file: `data` and `rows` (what a
trainer would train on), `checkpoint` and `measurement` (what a model makes of it), `text`, `analysis`, `silenced`, `changes` and
`runs` (numbers), `figures`, `export` and `page`, `report` (all of it in order), `command`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec

PACKAGES = ("datasets", "jinja2", "matplotlib", "peft", "rich", "trl", "typer")


def main(arguments: Sequence[str]) -> None:
    """Run `deft report`; exit with status 2 where a package of the extra `report` is missing."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        print(
            f'deft report: needs {", ".join(missing)}: pip install "deft_plugin[report]"',
            file=sys.stderr,
        )
        raise SystemExit(2)
    # They warn while they are imported, of an optional kernel and of a missing GPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # A filter, since DeepSpeed sets its own level then.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    from .command import main as command

    command(arguments)
