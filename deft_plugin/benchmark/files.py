"""Results as a CSV and a picture, and back from the CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .figure import draw
from .job import Job
from .tables import Result, Results, memory_bound_mib, ratios, teraflops


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The rows, whose keys may differ, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def write_files(results: Results, output: Path) -> None:
    """The results as benchmark.csv and benchmark.png in `output`."""
    rows = []
    for job, contestants in results.items():
        compared = ratios(contestants)
        for name, result in contestants.items():
            row = {**asdict(job), "contestant": name, **result}
            if "seconds" in result:
                row |= compared[name] | {"teraflops": teraflops(job, result["seconds"])}
                row["memory_bound_mib"] = memory_bound_mib(job)
            rows.append(row)
    write_csv(rows, output / "benchmark.csv")
    draw(results, output / "benchmark.png")


def read_results(paths: list[Path]) -> Results:
    """What `write_files` wrote, of all files together; a later file's figures replace an earlier one's."""
    results: Results = {}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                job = Job(
                    **{field.name: _parsed(row[field.name], field.type) for field in fields(Job)}
                )
                result: Result = {
                    key: float(row[key])
                    for key in ("seconds", "evaluation_seconds", "extra_mib", "error")
                    if row.get(key)
                }
                result |= {key: row[key] for key in ("remark", "absent") if row.get(key)}
                results.setdefault(job, {})[row["contestant"]] = result
    return results


def _parsed(text: str, type_: Any) -> Any:
    """A field of a job as it was before it was written; annotations are strings here."""
    if type_ == "bool":
        return text == "True"
    return {"int": int, "float": float, "str": str}[type_](text)
