"""The paper's table from files of `evaluate.py`: a row for each objective, a column for each benchmark and the average.

    python scripts/paper/table.py runs/paper/results/*.jsonl
    python scripts/paper/table.py runs/paper/results/*.jsonl --output runs/paper/table     # table.md and table.csv

Where the base model is Llama-3.1-8B the paper's own average stands beside.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import Annotated, Any

import typer

from deft_plugin.benchmark.files import write_csv
from paper import record
from paper.benchmarks import MATH
from paper.experiments import BASE, EXPERIMENTS, OBJECTIVES, is_llama
from paper.summary import AVERAGE, FIGURES, is_complete, summarise

NAMES = {
    BASE: "base",
    "nll": "nll",
    "p": "p",
    "eaft": "EAFT",
    "cayley_trans": "Cayley-Trans",
    "deft": "DEFT",
}
# Averages for Llama-3.1-8B by suite and objective, in percent.
PUBLISHED = {
    "math": dict(zip(NAMES, (0.91, 6.49, 10.03, 6.76, 10.38, 11.35), strict=True)),
    "medical": dict(zip(NAMES, (22.75, 50.21, 49.77, 51.18, 51.48, 52.00), strict=True)),
    "figfont": dict(zip(NAMES, (30.17, 33.40, 14.26, 42.71, 36.95, 46.34), strict=True)),
}
# Beside which figure they stand.
PUBLISHED_FIGURE = {suite: figures[0] for suite, figures in FIGURES.items()}
PAPER = "paper"

Evaluation = tuple[record.Header, list[record.Row]]


def load(paths: list[Path], partial: bool) -> dict[tuple[str, str | None], list[Evaluation]]:
    """The evaluations by suite and base model, in the table's order.

    Raises:
        ValueError: a file of something else, or one that is not finished while `partial` is false.
    """
    order = [BASE, *OBJECTIVES]
    found: dict[tuple[str, str | None], list[Evaluation]] = {}
    for path in paths:
        header, rows = record.read(path)
        if header["suite"] not in EXPERIMENTS or header.get("objective") not in order:
            raise ValueError(
                f"{path} is of the suite {header['suite']!r} and the objective {header.get('objective')!r}. Choices: "
                f"{', '.join(EXPERIMENTS)}; {', '.join(order)}."
            )
        if not is_complete(header, rows) and not partial:
            raise ValueError(
                f"{path} has {len(rows)} of {sum(header['questions'].values())} questions: evaluate.py with the same "
                "options goes on with it, and --partial shows it as it is."
            )
        if rows:
            found.setdefault((header["suite"], header["base_model"]), []).append((header, rows))
    for evaluations in found.values():
        evaluations.sort(key=lambda evaluation: order.index(evaluation[0]["objective"]))
    suites = list(EXPERIMENTS)
    return dict(sorted(found.items(), key=lambda item: (suites.index(item[0][0]), str(item[0][1]))))


def lines(
    suite: str, base_model: str | None, evaluations: list[Evaluation], k: int | None
) -> list[dict[str, Any]]:
    """A table's rows: suite, base model, figure, objective, benchmarks, average, and the paper's where it has one."""
    summaries = [summarise(header, rows, k) for header, rows in evaluations]
    benchmarks = list(dict.fromkeys(name for summary in summaries for name in summary))
    benchmarks.append(benchmarks.pop(benchmarks.index(AVERAGE)))
    result = []
    for figure in FIGURES[suite]:
        for (header, _), summary in zip(evaluations, summaries, strict=True):
            line = {
                "suite": suite,
                "base model": base_model,
                "figure": _named(figure, header, k),
                "objective": NAMES[header["objective"]],
                **{name: summary[name][figure] if name in summary else None for name in benchmarks},
            }
            if is_llama(base_model) and figure == PUBLISHED_FIGURE[suite]:
                line[PAPER] = PUBLISHED[suite][header["objective"]]
            result.append(line)
    return result


def notes(evaluations: list[Evaluation]) -> list[str]:
    """What a reader has to know of the rows: what is not the paper's, or not finished."""
    said = []
    # The average is over the benchmarks that there are: over others it is another figure.
    asked = list(dict.fromkeys(name for header, _ in evaluations for name in header["questions"]))
    for header, rows in evaluations:
        total = sum(header["questions"].values())
        wanted = list(MATH) if header["suite"] == "math" else asked
        left_out = [name for name in wanted if name not in header["questions"]]
        papers = EXPERIMENTS[header["suite"]]
        sampling = header["sampling"]
        remarks = [
            f"{name} {value!r} in training"
            for name, value in header["training"].get("not_the_papers", {}).items()
        ]
        remarks += [
            f"{name} {sampling[name]!r} instead of {value!r}"
            for name, value in (
                ("samples", papers.samples),
                ("temperature", papers.temperature),
                ("top_p", 1.0),
                ("max_new_tokens", papers.max_new_tokens),
            )
            if sampling[name] != value
        ]
        if left_out:
            remarks.append(f"average without {', '.join(left_out)}")
        if header["limit"] is not None:
            remarks.append(f"the first {header['limit']} questions of each benchmark")
        if len(rows) < total:
            remarks.append(f"{len(rows)} of {total} questions")
        if remarks:
            said.append(f"{NAMES[header['objective']]} ({header['model']}): {', '.join(remarks)}.")
    return said


def markdown(rows: list[dict[str, Any]], remarks: list[str]) -> str:
    """The rows as Markdown, a table for each figure, the best of a column in bold."""
    first = rows[0]
    text = [f"## {first['suite']}, {first['base model'] or 'base model not named'}", ""]
    for figure in dict.fromkeys(row["figure"] for row in rows):
        part = [row for row in rows if row["figure"] == figure]
        columns = list(part[0])[4:]
        text += [
            f"{figure}, in percent:",
            "",
            f"| objective | {' | '.join(columns)} |",
            f"|---|{'---:|' * len(columns)}",
        ]
        best = {
            column: max((row[column] for row in part if row[column] is not None), default=None)
            for column in columns
        }
        for row in part:
            cells = (_cell(row[column], best[column]) for column in columns)
            text.append(f"| {row['objective']} | {' | '.join(cells)} |")
        text.append("")
    return "\n".join([*text, *(f"- {remark}" for remark in remarks), ""])


def _named(figure: str, header: record.Header, k: int | None) -> str:
    samples = header["sampling"]["samples"]
    return figure.replace("@n", f"@{samples}").replace("@k", f"@{k or samples}")


def _cell(value: float | None, best: float | None) -> str:
    if value is None:
        return ""
    return f"**{value:.2f}**" if value == best else f"{value:.2f}"


def main(
    results: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False)],
    output: Annotated[Path | None, typer.Option(help="Also as OUTPUT.md and OUTPUT.csv.")] = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="Of pass@k; by default the samples there are.")
    ] = None,
    partial: Annotated[bool, typer.Option(help="Take files that are not finished.")] = False,
) -> None:
    """Print the table as Markdown."""
    try:
        texts, rows = [], []
        for (suite, base_model), evaluations in load(results, partial).items():
            part = lines(suite, base_model, evaluations, k)
            texts.append(markdown(part, notes(evaluations)))
            rows += part
        if not rows:
            raise ValueError("No file has an answered question yet.")
    except ValueError as error:
        raise typer.BadParameter(" ".join(str(error).split())) from None
    print("\n".join(texts))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".md").write_text("\n".join(texts))
        write_csv(rows, output.with_suffix(".csv"))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app()
