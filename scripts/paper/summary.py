"""What a file of answered questions says: figures by benchmark and their average, in percent."""

from __future__ import annotations

from collections.abc import Sequence

from paper.record import Header, Row

AVERAGE = "average"
# The figures of each suite; the first is the one to compare.
FIGURES = {
    "math": ("average@n", "pass@k"),
    "medical": ("accuracy", "no option taken"),
    "figfont": ("Jaro-Winkler", "exact", "Jaro-Winkler, threshold 0.7"),
}


def summarise(
    header: Header, rows: Sequence[Row], k: int | None = None
) -> dict[str, dict[str, float]]:
    """Figures by benchmark, each in percent, and under `AVERAGE` their mean over benchmarks.

    Args:
        header: of the file.
        rows: its answered questions.
        k: of pass@k; by default as many as there are samples.

    Raises:
        ValueError: fewer samples than k.
    """
    from paper.maths import average_of, pass_at

    by_benchmark: dict[str, list[Row]] = {}
    for row in rows:
        by_benchmark.setdefault(row["benchmark"], []).append(row)
    figures = {}
    for benchmark, answered in by_benchmark.items():
        scores = [row["scores"] for row in answered]
        if header["suite"] == "math":
            samples = header["sampling"]["samples"]
            figures[benchmark] = {
                "average@n": average_of(scores),
                "pass@k": pass_at(k or samples, scores),
            }
        elif header["suite"] == "medical":
            taken = [option for row in answered for option in row["taken"]]
            figures[benchmark] = {
                "accuracy": average_of(scores),
                "no option taken": taken.count(None) / len(taken),
            }
        else:
            figures[benchmark] = {
                name: sum(row[key][0] for row in answered) / len(answered)
                for name, key in zip(
                    FIGURES["figfont"], ("scores", "exact", "winklers"), strict=True
                )
            }
    names = FIGURES[header["suite"]]
    figures[AVERAGE] = {
        name: sum(figure[name] for figure in figures.values()) / len(figures) for name in names
    }
    return {
        benchmark: {name: 100 * value for name, value in figure.items()}
        for benchmark, figure in figures.items()
    }


def is_complete(header: Header, rows: Sequence[Row]) -> bool:
    """Whether every question of the header has its answers."""
    return len(rows) == sum(header["questions"].values())
