"""What the study's results files say: means with 95 % intervals, differences paired by seed, tables and plots.

`write_page` fills the places of docs that are marked `<!-- study: NAME -->` to `<!-- end of study -->`, so that no figure
in them is written by hand: "small" and "real" with all figures, "summary" with the scores alone.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy import stats
from study_results import BASE, read_lines

DOCS = Path(__file__).resolve().parent.parent
PAGES = ("docs/study.md", "docs/which-objective.md", "README.md")
SCALES = ("small", "real")
# Both names of one gradient.
NAMES = {"p": "p, dft"}
ORDER = ("nll", "p, dft", "eaft", "cayley", "cayley_trans", "deft")
# As in docs/gates.png, which can be told apart without red and green.
COLOURS = {
    "p, dft": "#e69f00",
    "eaft": "#a8488f",
    "cayley": "#009e73",
    "cayley_trans": "#d55e00",
    "deft": "#3d94d6",
}
SUMMARY = ("nll", "p, dft", "cayley_trans", "deft")

Line = Mapping[str, str]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval by Student's t; NaN for a single seed."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        count = len(values)
        mean = statistics.fmean(values)
        # A run that ended in NaN makes a mean that is none.
        if count < 2 or math.isnan(mean):
            return cls(mean, math.nan)
        error = statistics.stdev(values) / math.sqrt(count)
        return cls(mean, float(stats.t.ppf(0.975, count - 1)) * error)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return abs(self.mean) > self.half_width

    def text(self, form: str, factor: float = 1.0) -> str:
        """As "mean ± half the interval's width"."""
        mean = f"{factor * self.mean:{form}}"
        if math.isnan(self.half_width):
            return mean
        return f"{mean} ± {factor * self.half_width:{form.replace('+', '')}}"


@dataclass(frozen=True)
class Case:
    """A data set with a share of corrupted answers: its lines before training, and on the test split by objective."""

    data: str
    corrupted: float
    before: Line
    after: dict[str, list[Line]]

    @property
    def title(self) -> str:
        """The data set, and how much of it is corrupted."""
        return _title(self.data, self.corrupted)

    def estimate(self, objective: str, column: str) -> Estimate:
        """Of a column, over seeds."""
        return Estimate.of([float(line[column]) for line in self.after[objective]])

    def difference(self, objective: str, column: str) -> Estimate | None:
        """Of an objective's column to nll's, paired by seed; None without two seeds that both have."""
        columns = [
            {line["seed"]: float(line[column]) for line in self.after.get(name, ())}
            for name in (objective, "nll")
        ]
        seeds = sorted(columns[0].keys() & columns[1].keys())
        if objective == "nll" or len(seeds) < 2:
            return None
        return Estimate.of([columns[0][seed] - columns[1][seed] for seed in seeds])


def read_cases(path: Path) -> list[Case]:
    """The cases of a results file that have been run on the test split, in the file's order, objectives in `ORDER`."""
    lines = [line for line in read_lines(path) if line["split"] == "test"]
    before = {line["data"]: line for line in lines if line["objective"] == BASE}
    after: dict[tuple[str, float], dict[str, list[Line]]] = {}
    for line in lines:
        if line["objective"] == BASE:
            continue
        by_objective = after.setdefault((line["data"], float(line["corrupted"])), {})
        by_objective.setdefault(_shown(line["objective"]), []).append(line)
    return [
        Case(data, corrupted, before[data], _ordered(by_objective))
        for (data, corrupted), by_objective in after.items()
    ]


def full_table(cases: Iterable[Case]) -> str:
    """All figures, a table a case."""
    parts = []
    for case in cases:
        before = case.before
        parts.append(
            f"**{case.title}.** Before training: mean focus {float(before['focus']):.2f}, mean probability of the target "
            f"{float(before['p']):.2f}, score {float(before['score']):.1%}, nll {float(before['nll']):.3f}, calibration error "
            f"{float(before['calibration_error']):.3f}, nll of the rest {float(before['other_nll']):.3f}.\n"
        )
        parts.append(
            "| objective | learning rate | score, % | difference to nll, paired | nll | calibration error | nll of the rest |\n"
            "|---|---|---|---|---|---|---|"
        )
        for objective, lines in case.after.items():
            parts.append(
                f"| `{objective}` | {float(lines[0]['learning_rate']):.0e} | "
                f"{case.estimate(objective, 'score').text('.1f', 100)} | "
                f"{_difference(case.difference(objective, 'score'))} | "
                f"{case.estimate(objective, 'nll').text('.3f')} | "
                f"{case.estimate(objective, 'calibration_error').text('.3f')} | "
                f"{case.estimate(objective, 'other_nll').text('.3f')} |"
            )
        parts.append("")
    return "\n".join(parts)


def summary_table(cases: Iterable[Case]) -> str:
    """The scores of a few objectives, a line a case."""
    header = " | ".join(f"`{name}`" for name in SUMMARY)
    lines = [
        f"| | focus before | before | {header} |",
        "|---|---|---|" + "---|" * len(SUMMARY),
    ]
    for case in cases:
        scores = []
        for name in SUMMARY:
            if name not in case.after:
                scores.append("")
                continue
            difference = case.difference(name, "score")
            text = case.estimate(name, "score").text(".1f", 100)
            # Bold where the paired interval does not hold 0: it is not nll's score.
            scores.append(
                f"**{text}**" if difference is not None and difference.excludes_zero else text
            )
        lines.append(
            f"| {case.title} | {float(case.before['focus']):.2f} | {float(case.before['score']) * 100:.1f} | "
            + " | ".join(scores)
            + " |"
        )
    return "\n".join(lines)


def rates_table(path: Path) -> str:
    """Scores on the validation split by learning rate, of one seed: what a wrong rate costs. A table a case."""
    lines = [line for line in read_lines(path) if line["split"] == "validation"]
    scores: dict[tuple[str, float], dict[str, dict[float, str]]] = {}
    for line in lines:
        case = scores.setdefault((line["data"], float(line["corrupted"])), {})
        objective = _shown(line["objective"])
        rate = float(line["learning_rate"])
        case.setdefault(objective, {})[rate] = f"{100 * float(line['score']):.1f}"
    parts = []
    for (data, corrupted), by_objective in scores.items():
        rates = sorted({rate for by_rate in by_objective.values() for rate in by_rate})
        parts.append(
            f"| {_title(data, corrupted)} | " + " | ".join(f"{rate:.0e}" for rate in rates) + " |"
        )
        parts.append("|---|" + "---|" * len(rates))
        parts += [
            f"| `{name}` | " + " | ".join(by_rate.get(rate, "") for rate in rates) + " |"
            for name, by_rate in _ordered(by_objective).items()
        ]
        parts.append("")
    return "\n".join(parts)


def _title(data: str, corrupted: float) -> str:
    return data + (f", {corrupted:.0%} corrupted" if corrupted else "")


def _shown(objective: str) -> str:
    return NAMES.get(objective, objective)


def _ordered(by_objective: Mapping[str, Value]) -> dict[str, Value]:
    return {name: by_objective[name] for name in sorted(by_objective, key=ORDER.index)}


def _difference(difference: Estimate | None) -> str:
    if difference is None:
        return ""
    text = difference.text("+.1f", 100)
    return f"**{text}**" if difference.excludes_zero else text


def plot(cases: Sequence[Case], path: Path) -> None:
    """Differences to nll with their intervals: score, nll, and nll of what was not trained on."""
    columns = {
        "score": ("score minus nll's, %", 100.0),
        "nll": ("nll minus nll's, nats a token", 1.0),
        "other_nll": ("nll of the rest minus nll's", 1.0),
    }
    objectives = list(dict.fromkeys(name for case in cases for name in case.after if name != "nll"))
    figure, axes = plt.subplots(
        1, len(columns), sharey=True, figsize=(11, 1.2 + 0.7 * len(cases)), layout="constrained"
    )
    for axis, (column, (label, factor)) in zip(axes, columns.items(), strict=True):
        axis.axvline(0, color="0.6", linewidth=1)
        for position, case in enumerate(cases):
            for step, objective in enumerate(objectives):
                difference = case.difference(objective, column)
                if difference is None:
                    continue
                axis.errorbar(
                    factor * difference.mean,
                    position + 0.14 * (step - (len(objectives) - 1) / 2),
                    xerr=factor * difference.half_width,
                    color=COLOURS[objective],
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=objective if position == 0 else None,
                )
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(cases)), [case.title.replace(", ", ",\n") for case in cases])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(objectives))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def versions(path: Path) -> str:
    """What a results file was made with."""
    lines = read_lines(path)
    names = ("torch", "transformers", "trl")
    found = {name: sorted({line[name] for line in lines}) for name in names}
    hours = sum(float(line["seconds"]) for line in lines) / 3600
    return f"{len(lines)} runs, {hours:.1f} hours of one core; " + ", ".join(
        f"{name} {' and '.join(each)}" for name, each in found.items()
    )


def fill(text: str, name: str, content: str) -> str:
    """`text` with `content` in its places called `name`."""
    pattern = rf"(<!-- study: {name} -->\n).*?(\n?<!-- end of study -->)"
    return re.sub(
        pattern, lambda found: f"{found[1]}\n{content.strip()}\n{found[2]}", text, flags=re.DOTALL
    )


def contents(results: Path) -> dict[str, str]:
    """What goes into the marked places, by name, from the results files that are there."""
    files = {name: results / f"{name}.csv" for name in SCALES if (results / f"{name}.csv").exists()}
    cases = {name: read_cases(path) for name, path in files.items()}
    return {
        **{name: full_table(cases[name]) for name in files},
        **{f"{name} versions": versions(path) for name, path in files.items()},
        **{f"{name} summary": summary_table(cases[name]) for name in files},
        **{f"{name} rates": rates_table(path) for name, path in files.items()},
    }


def write_page(results: Path) -> None:
    """Fill the docs' marked places, and draw the plots beside the results files."""
    for page in PAGES:
        path = DOCS / page
        text = path.read_text()
        for name, content in contents(results).items():
            text = fill(text, name, content)
        path.write_text(text)
    for name in SCALES:
        if (results / f"{name}.csv").exists():
            plot(read_cases(results / f"{name}.csv"), results / f"{name}.png")
