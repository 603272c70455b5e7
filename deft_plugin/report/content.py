"""What the page says, and the numbers of report.json: the data, what training has changed, runs."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import deft_plugin

from . import captions
from .analysis import (
    BAND_EDGES,
    effects_of,
    gates_of,
    gradient_map_of,
    groups_of_equal_gates,
    standing_of,
)
from .changes import changes_between
from .export import write_rows, write_tokens
from .figures import standing as standing_figures
from .figures.changes import before_after_figure, changes_figure
from .figures.dress import Picture, picture
from .figures.training import comparison_figure, training_figure
from .measured import Measured
from .options import Options
from .page import MOST_KIND_LINES, MOST_TOKEN_LINES, Content, shaded_rows
from .progress import Steps
from .rows import Sample
from .runs import COMPARED, Run, compared_metrics, figures_of
from .silenced import Texts, kind_lines, row_lines, stop_of, token_lines, varied

# Fewer tokens than that say little about shares of a few per cent.
FEW_TOKENS = 1000


def content_of(
    options: Options,
    names: list[str],
    measured: Measured | None,
    run: Run | None,
    runs: list[Run],
    steps: Steps,
) -> tuple[Content, dict[str, Any]]:
    """What the page says, and the numbers of report.json."""
    pictures: list[Picture] = []
    numbers: dict[str, Any] = {"versions": _versions(), "options": options}
    content: dict[str, Any] = {
        "title": "Runs compared" if runs else "Focus and probability over training",
        "facts": [],
        "objective": options.objective,
    }
    count = (measured is not None) * 5 + (run is not None) + len(COMPARED) * bool(runs)
    count += 2 * (measured is not None and measured.after is not None)
    with steps("drawing", count) as advance:

        def draw(name: str, alt: str, caption: str, drawing: Any) -> None:
            pictures.append(picture(name, alt, caption, drawing))
            advance(1)

        if measured is not None:
            content["title"] = "What the gate does to your data"
            content["facts"] = _facts(options, measured)
            _add_data(options, names, measured, content, numbers, draw)
            _add_changes(measured, content, numbers, draw)
        if run is not None:
            content["run_label"] = run.name
            numbers["run"] = {
                metric: {"training": run.training(metric), "held_out": run.held_out(metric)}
                for metric in COMPARED
            }
            draw("training", *captions.TRAINING, training_figure(run))
        if runs:
            _add_runs(runs, content, numbers, draw)
    if measured is None:
        content["facts"] = [
            ("runs", ", ".join(each.name for each in [*runs, *([run] if run else [])]))
        ]
    return Content(**content, pictures={each.name: each for each in pictures}), numbers


Draw = Callable[[str, str, str, Any], None]


def _add_data(
    options: Options,
    names: list[str],
    measured: Measured,
    content: dict[str, Any],
    numbers: dict[str, Any],
    draw: Draw,
) -> None:
    sample, table, shown = measured.sample, measured.before, options.objective
    gates = gates_of(table, names)
    groups = groups_of_equal_gates(gates)
    standing, effects = standing_of(table), effects_of(table, gates)
    gradients = gradient_map_of(table, gates)
    texts = Texts.of(measured.tokenizer, sample.rows, table)
    tokens = token_lines(sample.rows, table, gates, texts, shown, measured.after)
    rows = row_lines(sample.rows, table, gates, texts, shown)
    kinds = kind_lines(tokens, shown)
    write_tokens(options.output / "tokens.csv", tokens)
    write_rows(options.output / "rows.csv", rows)
    content.update(
        standing=standing,
        effects=effects,
        sample_notes=measured.notes + _notes(options, sample, standing.tokens),
        shaded=shaded_rows(sample.rows, table, gates, texts, rows, shown, measured.after),
        row_count=len(rows),
        token_lines=varied(tokens)[:MOST_TOKEN_LINES],
        stop=stop_of(measured.tokenizer, table, gates[shown]),
        kind_lines=kinds[:MOST_KIND_LINES],
    )
    numbers.update(
        model=measured.label,
        sample={
            "drawn": sample.drawn,
            "available": sample.available,
            "rows": len(sample.rows),
            "rows_without_a_token_to_train_on": sample.unscored,
            "tokens": sample.tokens,
        },
        standing=standing,
        bands=BAND_EDGES,
        objectives=effects,
        gradients=gradients,
        most_silenced_tokens=tokens[:MOST_TOKEN_LINES],
        most_silenced_kinds=kinds[:MOST_KIND_LINES],
        rows=rows,
    )
    draw("regimes", *captions.REGIMES, standing_figures.regimes_figure(standing))
    draw("distributions", *captions.DISTRIBUTIONS, standing_figures.distributions_figure(standing))
    if any(effect.gradient_by_band for effect in effects):
        draw("shares", *captions.SHARES, standing_figures.shares_figure(standing, effects))
    draw("gates", *captions.GATES, standing_figures.gates_figure(table, gates, groups))
    draw("gradients", *captions.GRADIENTS, standing_figures.gradients_figure(gradients, groups))


def _add_changes(
    measured: Measured, content: dict[str, Any], numbers: dict[str, Any], draw: Draw
) -> None:
    if measured.after is None:
        return
    before, after = measured.before, measured.after
    changes = changes_between(before, after)
    standing = standing_of(after)
    content.update(changes=changes, after_label=measured.after_label, standing_after=standing)
    numbers.update(after=measured.after_label, standing_after=standing, changes=changes)
    draw("changes", *captions.CHANGES, changes_figure(before, after, changes))
    draw("before_after", *captions.BEFORE_AFTER, before_after_figure(before, after))


def _add_runs(
    runs: list[Run], content: dict[str, Any], numbers: dict[str, Any], draw: Draw
) -> None:
    lines = [figures_of(run) for run in runs]
    compared = compared_metrics(runs)
    content.update(
        runs=lines,
        compared=compared,
        task_figures=sorted({name for line in lines for name in line.task}),
    )
    numbers["runs"] = lines
    for metric in compared:
        title, unit = COMPARED[metric]
        draw(
            f"compare_{metric}",
            f"{title} of {len(runs)} runs over their optimizer steps.",
            f"{title}, {unit}. Dots: held-out rows; thin lines: training.",
            comparison_figure(runs, metric),
        )


def _facts(options: Options, measured: Measured) -> list[tuple[str, str]]:
    sample = measured.sample
    facts = [
        ("model", measured.label),
        ("data", f"{options.data}" + ("" if options.split == "train" else f", {options.split}")),
        ("rows", f"{len(sample.rows):,} of {sample.available:,}, drawn at random"),
        ("tokens trained on", f"{sample.tokens:,}"),
    ]
    if measured.after_label is not None:
        facts.insert(1, ("after", measured.after_label))
    if len(sample.rows) == sample.available:
        facts[-2] = ("rows", f"all {sample.available:,}")
    return facts


def _notes(options: Options, sample: Sample, tokens: int) -> list[str]:
    notes = []
    if sample.unscored:
        some = ", ".join(map(str, sample.unscored[:10])) + (
            " …" if len(sample.unscored) > 10 else ""
        )
        within = (
            f" within {options.max_length:,} tokens (--max-length)" if options.max_length else ""
        )
        notes.append(
            f"{len(sample.unscored):,} of the {sample.drawn:,} rows drawn have no token to train on{within}, and are left out, as "
            f"the trainer would: {some}."
        )
    if tokens < FEW_TOKENS and len(sample.rows) < sample.available:
        notes.append(
            f"{tokens:,} tokens are few; shares of a few per cent are uncertain. More rows: --rows."
        )
    return notes


def _versions() -> dict[str, str]:
    versions = {"deft_plugin": deft_plugin.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "trl", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
