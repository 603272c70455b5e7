"""docs/models.md: what comes of every class, one column for each line of versions.

    for environment in .venv .venv-axolotl; do $environment/bin/python -m tests.head.model_table docs/models.md; done

writes the column of the transformers that each has, and keeps the others.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

from transformers.utils import logging

from .every_class import CLASSES, INSTALLED, Verdict, verdict_on

Column = dict[str, str]  # By row: class and model_type.

HEADER = """# Models

Every causal LM and every image, video or audio language model of transformers, by class. Written by
`python -m tests.head.model_table docs/models.md`; the same comparison is the test `tests/head/test_every_class.py`.

A class's smallest model, random and with its logits' scale, softcap and the like far from 1, is given a batch with
and without the gated head. **Equal** means: with `add_gated_head(model, "nll")` the model's own loss to 1e-4 and the
gradients of all its parameters, and of images and audio, to 1 % (float32; rounding leaves 1e-6), with
`num_items_in_batch` and with the router's loss of a mixture of experts too, where it has one; and with `"deft"` the
formula on its own logits. **Refused** classes raise a ValueError with the reason before they train. A class
that is in no table, remote code's too, is compared with its own forward all the same, at its first pass.
"""


def cell_of(verdict: Verdict) -> str:
    """A verdict in a few words."""
    words = verdict.tried_with if verdict.result == "equal" else verdict.reason
    return f"{verdict.result}: {words}"


def read(table: str) -> dict[str, Column]:
    """The columns of a table as `written` writes it, by version."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    if not rows:
        return {}
    (_, _, *versions), _, *body = rows
    return {
        version.removeprefix("transformers "): {
            f"{name}|{kind}": cells[index] for name, kind, *cells in body if cells[index]
        }
        for index, version in enumerate(versions)
    }


def written(columns: dict[str, Column]) -> str:
    """The document."""
    versions = sorted(columns, key=lambda version: [int(n) for n in re.findall(r"\d+", version)])
    rows = sorted({row for column in columns.values() for row in column}, key=str.lower)
    lines = [HEADER]
    for version in versions:
        results = [cell.split(":")[0] for cell in columns[version].values()]
        counts = ", ".join(f"{results.count(result)} {result}" for result in sorted(set(results)))
        lines.append(f"- transformers {version}: {counts}, of {len(results)}")
    lines.append("")
    lines.append(
        "| class | model_type | " + " | ".join(f"transformers {v}" for v in versions) + " |"
    )
    lines.append("|" + "---|" * (2 + len(versions)))
    for row in rows:
        cells = [columns[version].get(row, "") for version in versions]
        lines.append("| " + " | ".join([*row.split("|"), *cells]) + " |")
    return "\n".join(lines) + "\n"


def main(path: Path) -> None:
    """Write the installed transformers' column into the document at `path`."""
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    columns = read(path.read_text()) if path.exists() else {}
    column = columns[str(INSTALLED)] = {}
    for model_type, class_name in CLASSES:
        try:
            cell = cell_of(verdict_on(model_type, class_name))
        except Exception as error:
            cell = f"WRONG: {type(error).__name__}"
            print(f"{class_name}: {error}", file=sys.stderr)
        column[f"{class_name}|{model_type}"] = cell
    path.write_text(written(columns))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
