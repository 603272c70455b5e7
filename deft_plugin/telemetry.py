"""Where histograms go: a file in the run's folder, and the reporters that the trainer has.

A reporter is never started: what is written goes to those that transformers' own callbacks have started.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .histograms import EDGES, QUANTITIES, Histogram

FILE_NAME = "gate_histograms.jsonl"
# The split of a logging window; an evaluation's is the prefix of its metrics, "eval".
TRAINING = "training"


@dataclass(frozen=True)
class LoggedHistograms:
    """What one line of the file holds.

    Args:
        step: the optimizer step after which it was logged.
        split: "training" for the window since the last log, or the prefix of an evaluation's metrics.
        histograms: by the names in `histograms.QUANTITIES`.
    """

    step: int
    split: str
    histograms: Mapping[str, Histogram]


def read_histograms(path: str | os.PathLike[str]) -> list[LoggedHistograms]:
    """A run's `gate_histograms.jsonl`, in order; the last one where a step and split were logged twice.

    A last line without its end, which a kill may leave behind, is left out.

    Raises:
        ValueError: a line that is none of this file's.
    """
    entries = {}
    for number, line in enumerate(_whole_lines(Path(path)), start=1):
        entry = _parse(line, f"{path}, line {number}")
        entries[entry.step, entry.split] = entry
    return list(entries.values())


class Telemetry:
    """Writes the histograms of one trainer. For the world's first rank alone."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._unreported: list[LoggedHistograms] = []
        # What another trainer has written before this one, an interrupted run to go on with or an old one.
        self._earlier = _drop_torn_line(self._path)

    @property
    def _path(self) -> Path:
        return Path(self._trainer.args.output_dir, FILE_NAME)

    def begin_training(self, step: int) -> None:
        """Leave of the file what was logged up to `step`, the checkpoint's or 0, and nothing of another run."""
        if self._path.exists():
            kept = {}
            for line in _whole_lines(self._path)[0 if step else self._earlier :]:
                entry = _parse(line, self._path)
                if entry.step <= step:
                    kept[entry.step, entry.split] = line
            beside = self._path.with_suffix(".tmp")
            beside.write_text("".join(kept.values()))
            beside.replace(self._path)
        self._earlier = 0

    def write(self, split: str, histograms: Mapping[str, Histogram]) -> None:
        """Write histograms, unless there are none, into the file; the reporters get them when the trainer logs."""
        if not histograms:
            return
        entry = LoggedHistograms(self._trainer.state.global_step, split, histograms)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(_format(entry))
        self._unreported.append(entry)

    def report(self) -> None:
        """Give what was written since to the trainer's reporters, which have begun when they were given the metrics."""
        # Not before: the file's readers need torch alone.
        from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
        from transformers.integrations.integration_utils import rewrite_logs

        senders = {
            TensorBoardCallback: _to_tensorboard,
            WandbCallback: _to_wandb,
            TrackioCallback: _to_trackio,
        }
        for entry in self._unreported:
            prefix = "" if entry.split == TRAINING else f"{entry.split}_"
            bins: dict[str, Bins] = {}
            for name, histogram in entry.histograms.items():
                bins[f"{prefix}{name}"] = histogram.linear()
                bins[f"{prefix}{name}_log10"] = histogram.log10()
            # "train/gate" and "eval/gate", beside "train/mean_gate".
            bins = rewrite_logs(bins)
            for callback in self._trainer.callback_handler.callbacks:
                for kind, send in senders.items():
                    if isinstance(callback, kind):
                        send(callback, bins, entry.step)
        self._unreported.clear()


# Edges, and the counts between them.
Bins = tuple[list[float], list[int]]


def _to_tensorboard(callback: Any, bins: Mapping[str, Bins], step: int) -> None:
    writer = callback.tb_writer
    if writer is None:
        return
    for tag, (edges, counts) in bins.items():
        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        writer.add_histogram_raw(
            tag,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            # Shown nowhere.
            sum=sum(count * x for count, x in zip(counts, middles, strict=True)),
            sum_squares=sum(count * x * x for count, x in zip(counts, middles, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )
    writer.flush()


def _to_wandb(callback: Any, bins: Mapping[str, Bins], step: int) -> None:
    import wandb

    if wandb.run is not None:
        wandb.log(_as_panels(wandb.Histogram, bins, step))


def _to_trackio(callback: Any, bins: Mapping[str, Bins], step: int) -> None:
    import trackio

    if trackio.context_vars.current_run.get() is not None:
        trackio.log(_as_panels(trackio.Histogram, bins, step))


def _as_panels(kind: Any, bins: Mapping[str, Bins], step: int) -> dict[str, Any]:
    """What both take, with the axis over which transformers has their metrics drawn."""
    panels = {tag: kind(np_histogram=(counts, edges)) for tag, (edges, counts) in bins.items()}
    return {**panels, "train/global_step": step}


def _format(entry: LoggedHistograms) -> str:
    # Edges in every line, so that each can be read alone.
    counts = {name: histogram.counts for name, histogram in entry.histograms.items()}
    line = {"step": entry.step, "split": entry.split, "edges": EDGES, **counts}
    return json.dumps(line) + "\n"


def _parse(line: str, place: object) -> LoggedHistograms:
    try:
        values = json.loads(line)
        edges = tuple(values["edges"])
        histograms = {
            name: Histogram(tuple(values[name]), edges) for name in QUANTITIES if name in values
        }
        return LoggedHistograms(values["step"], values["split"], histograms)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place}: {line[:60]!r} is no line of histograms ({type(error).__name__}: {error})."
        ) from None


def _whole_lines(path: Path) -> list[str]:
    # What else a file of this name may hold is no reason to end a run.
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _drop_torn_line(path: Path) -> int:
    """Cut off what a kill has left of a last line; the number of whole ones."""
    if not path.exists():
        return 0
    # In bytes: reading as text makes one character of the two that end a line on Windows.
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return len(_whole_lines(path))
