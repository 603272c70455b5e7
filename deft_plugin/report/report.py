"""A report from beginning to end: rows, measurements, numbers, figures, page."""

from __future__ import annotations

import gc
import platform
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

import deft_plugin

from . import figures
from .analysis import (
    BAND_EDGES,
    DEFAULT_OBJECTIVES,
    check_objectives,
    effects_of,
    gates_of,
    gradient_map_of,
    groups_of_equal_gates,
    standing_of,
)
from .changes import changes_between
from .checkpoint import (
    Checkpoint,
    Placement,
    check_same_vocabulary,
    checkpoint_after,
    checkpoint_with,
    load_tokenizer,
    trained_on_another,
)
from .data import in_trl_format, load_splits, split_of
from .export import write_json, write_rows, write_tokens
from .figures import Picture, picture
from .measurement import TokenTable, measure
from .page import MOST_KIND_LINES, MOST_TOKEN_LINES, Content, render, shaded_rows
from .rows import Sample, prepare_rows
from .runs import COMPARED, Run, compared_metrics, figures_of, load_run, load_runs
from .silenced import Texts, kind_lines, row_lines, stop_of, token_lines, varied

# Fewer tokens than that say little about shares of a few per cent.
FEW_TOKENS = 1000


@dataclass(frozen=True)
class Options:
    """What a report is to be about; the command's options.

    Args:
        output: the folder to write to.
        model: a model's folder or its name on the hub; None for a comparison of runs alone.
        data: a file, a folder or a data set on the hub, in one of TRL's formats.
        adapter: a LoRA adapter on the model, from which the report starts.
        after: a second checkpoint to measure, an adapter for the model or a model.
        rows: how many rows to draw.
        max_length: tokens to which rows are cut; 0 for no cut.
        columns: where they do not have TRL's names, "question,answer" or one name.
        split, config: of the data set.
        chat_template: a Jinja file in place of the model's.
        assistant_only: of messages, only what the assistant says is trained on.
        objectives: which to look at.
        objective: by which texts are shaded and ordered.
        run: the log of a run, for its course.
        compare: logs of runs to compare.
        seed: draws the rows.
        batch_size: rows in a forward pass.
        placement: where and in which numbers models are loaded.
    """

    output: Path
    model: str | None = None
    data: str | None = None
    adapter: str | None = None
    after: str | None = None
    rows: int = 64
    max_length: int = 1024
    columns: str | None = None
    split: str = "train"
    config: str | None = None
    chat_template: Path | None = None
    assistant_only: bool = False
    objectives: tuple[str, ...] = DEFAULT_OBJECTIVES
    objective: str = "deft"
    run: str | None = None
    compare: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 8
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("batch_size", 1), ("max_length", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


@dataclass(frozen=True)
class _Measured:
    """The rows, and what one or two checkpoints make of them."""

    tokenizer: PreTrainedTokenizerBase
    sample: Sample
    label: str
    before: TokenTable
    after_label: str | None
    after: TokenTable | None
    notes: list[str]


def make_report(options: Options, console: Console | None = None) -> Path:
    """Write report.html, report.json, tokens.csv, rows.csv and figures/*.png; return the page's path.

    Args:
        options: what to look at.
        console: for progress bars; None for none.

    Raises:
        ValueError: an option that does not fit; the message names it, its value and the choices. Everything that can be
            known before a model is loaded is found before.
    """
    _check_together(options)
    names = check_objectives(options.objectives, options.objective)
    runs = load_runs(options.compare)
    run = None if options.run is None else load_run(options.run, option="--run")
    _check_course(run)
    with _progress(console) as steps:
        measured = None if options.model is None else _measure(options, names, steps)
        with _writing(options.output):
            (options.output / "figures").mkdir(parents=True, exist_ok=True)
            content, numbers = _content(options, names, measured, run, runs, steps)
            for each in content.pictures.values():
                (options.output / "figures" / f"{each.name}.png").write_bytes(each.light)
                (options.output / "figures" / f"{each.name}-dark.png").write_bytes(each.dark)
            write_json(options.output / "report.json", numbers)
            page = options.output / "report.html"
            page.write_text(render(content), encoding="utf-8")
    return page


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Raise `ValueError` where something cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--output {str(output)!r} is no folder to write to: {error}.") from None


def _check_together(options: Options) -> None:
    if options.model is None:
        needing = {
            "--data": options.data,
            "--adapter": options.adapter,
            "--after": options.after,
        }
        given = [f"{name} {value!r}" for name, value in needing.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]} needs a MODEL: deft report MODEL --data DATA.")
        if not options.compare and options.run is None:
            raise ValueError(
                "There is nothing to report on. Name a MODEL and --data DATA, or runs with --compare or --run."
            )
    elif options.data is None:
        raise ValueError(
            f"MODEL {options.model!r} needs data to be measured on: --data with a file, a folder or a name on the hub."
        )


def _check_course(run: Run | None) -> None:
    shown = ("mean_focus", "mean_target_probability")
    if run is not None and not any(run.training(m) or run.held_out(m) for m in shown):
        raise ValueError(
            f"--run {str(run.path)!r} has logged none of {', '.join(shown)}: TRL's own losses do not. Name a run with "
            "an objective of deft_plugin."
        )


def _measure(options: Options, names: list[str], steps: _Steps) -> _Measured:
    """Everything that needs the model."""
    assert options.model is not None
    assert options.data is not None
    first = checkpoint_with(options.model, options.adapter)
    second = None if options.after is None else checkpoint_after(options.model, options.after)
    tokenizer = load_tokenizer(options.model, options.chat_template)
    if second is not None:
        check_same_vocabulary(tokenizer, options.model, second)
    with steps("preparing rows", 1) as advance:
        splits = load_splits(options.data, options.config)
        data = split_of(splits, options.split, options.data)
        sample = prepare_rows(
            in_trl_format(data, options.data, options.columns),
            tokenizer,
            rows=options.rows,
            seed=options.seed,
            max_length=options.max_length or None,
            assistant_only=options.assistant_only,
            name=options.data,
        )
        advance(1)
    # Before a model is loaded, and after all else that can be wrong.
    with _writing(options.output):
        (options.output / "figures").mkdir(parents=True, exist_ok=True)
    notes = [
        f"{checkpoint.adapter} was trained on {base}, as its adapter_config.json says, and is measured on "
        f"{checkpoint.model}. Unless they are the same model, what it makes of the data says nothing."
        for checkpoint in (first, second)
        if checkpoint is not None and (base := trained_on_another(checkpoint)) is not None
    ]
    before = _table_of(first, options, sample, names, steps)
    after = None if second is None else _table_of(second, options, sample, names, steps)
    after_label = None if second is None else second.label
    return _Measured(tokenizer, sample, first.label, before, after_label, after, notes)


def _table_of(
    checkpoint: Checkpoint, options: Options, sample: Sample, names: list[str], steps: _Steps
) -> TokenTable:
    with steps(f"loading {checkpoint.label}", 1) as advance:
        model = options.placement.load(checkpoint)
        advance(1)
    top_ks = {deft_plugin.build_objective(name).top_k for name in names}
    try:
        with steps(f"measuring {checkpoint.label}", len(sample.rows)) as advance:
            return measure(
                model,
                sample.rows,
                batch_size=options.batch_size,
                top_ks=sorted(k for k in top_ks if k is not None),
                advance=advance,
            )
    except ValueError as error:
        raise ValueError(f"{checkpoint.option} {checkpoint.label!r}: {error}") from None
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{checkpoint.option} {checkpoint.label!r}: out of memory (--batch-size {options.batch_size}, --max-length "
            f"{options.max_length}; --dtype bfloat16, --four-bit): {textwrap.shorten(str(error), 120)}"
        ) from None
    finally:
        # A GPU need not hold the next checkpoint beside this one.
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _content(
    options: Options,
    names: list[str],
    measured: _Measured | None,
    run: Run | None,
    runs: list[Run],
    steps: _Steps,
) -> tuple[Content, dict[str, Any]]:
    """What the page says, and the numbers of report.json."""
    pictures: list[Picture] = []
    numbers: dict[str, Any] = {"versions": _versions(), "options": options}
    content: dict[str, Any] = {
        "title": "Runs compared",
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
            draw("training", *_TRAINING, figures.training_figure(run))
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
    measured: _Measured,
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
    draw("regimes", *_REGIMES, figures.regimes_figure(standing))
    draw("distributions", *_DISTRIBUTIONS, figures.distributions_figure(standing))
    if any(effect.gradient_by_band for effect in effects):
        draw("shares", *_SHARES, figures.shares_figure(standing, effects))
    draw("gates", *_GATES, figures.gates_figure(table, gates, groups))
    draw("gradients", *_GRADIENTS, figures.gradients_figure(gradients, groups))


def _add_changes(
    measured: _Measured, content: dict[str, Any], numbers: dict[str, Any], draw: Draw
) -> None:
    if measured.after is None:
        return
    before, after = measured.before, measured.after
    changes = changes_between(before, after)
    standing = standing_of(after)
    content.update(changes=changes, after_label=measured.after_label, standing_after=standing)
    numbers.update(after=measured.after_label, standing_after=standing, changes=changes)
    draw("changes", *_CHANGES, figures.changes_figure(before, after, changes))
    draw("before_after", *_BEFORE_AFTER, figures.before_after_figure(before, after))


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
            figures.comparison_figure(runs, metric),
        )


_REGIMES = (
    "A scale of the mean focus from 0 to 1 with the paper's three regimes and your data.",
    "How to read it: the further to the right your data lies, the more the model believes to know already, and the more a gated "
    "objective keeps of that.",
)
_DISTRIBUTIONS = (
    "Three histograms over tokens: probability of the target, focus, entropy.",
    "How to read it: each bar is the share of tokens in its range. Many tokens at probability 0 with a focus near 1 are "
    "conflicts: the model is settled on something else than your data has.",
)
_SHARES = (
    "Bars of shares: tokens by probability of the target, and each objective's gradient by the same bands.",
    "How to read it: the first bar is how many tokens each band has; the others, how much of an objective's gradient comes from "
    "them (the tokens' gradients in the logits, their lengths added up). For its share of the tokens, nll takes most from what "
    "the model believes least; a gate moves the weight to the right.",
)
_GATES = (
    "The gate of each objective over the target's probability.",
    "How to read it: the mean gate of the tokens at each probability; the band holds eight in ten of them. A wide band means "
    "that the gate depends on more than the target's probability: for DEFT, on how settled the model is.",
)
_GRADIENTS = (
    "Heat maps of the mean gradient's length over probability and entropy, one for each objective.",
    "How to read it: each cell is the mean over the tokens of your sample that lie in it, from 0 to √2; grey cells have none. At the lower left "
    "are conflicts, tokens that the model is certain to be something else: nll pulls hardest there.",
)
_CHANGES = (
    "Left, each token's change of probability against its change of loss; right, shares of tokens learned and forgotten by "
    "probability before.",
    "How to read it: left, tokens at the lower right were learned, those at the upper left forgotten; dotted lines mark a change of 0.1. Dots "
    "high up with hardly a change of probability are improbable tokens that became far less probable still: nll counts them, answers do not. Right, "
    "by how sure the model was of the token before; what was below 0.1 can hardly be forgotten, nor what was above 0.9 be learned.",
)
_BEFORE_AFTER = (
    "Distributions of the target's probability before and after training.",
    "How to read it: left, shares of tokens in ranges of probability. Right, on logarithmic scales, the share of tokens whose probability is below "
    "a value: a line that lies higher has more tokens that the model holds to be next to impossible.",
)
_TRAINING = (
    "Mean focus, probability of the target and gate over the optimizer steps.",
    "How to read it: lines are means over the training tokens of a logging window, dots over held-out rows. A focus that "
    "rises faster than the probability is a model that grows certain, of the wrong tokens too.",
)


def _facts(options: Options, measured: _Measured) -> list[tuple[str, str]]:
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


@dataclass
class _Steps:
    """Progress bars, or nothing."""

    progress: Progress | None

    @contextmanager
    def __call__(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar that the context moves."""
        if self.progress is None:
            yield lambda count: None
            return
        bar = self.progress.add_task(description, total=total)
        progress = self.progress
        yield lambda count: progress.advance(bar, count)
        # Some pictures are drawn only where there is something to see.
        progress.update(bar, completed=total)


@contextmanager
def _progress(console: Console | None) -> Iterator[_Steps]:
    if console is None:
        yield _Steps(None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _Steps(progress)
