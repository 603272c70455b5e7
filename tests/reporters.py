"""What a run's reporters have kept of its histograms, read as their own programs read it."""

from __future__ import annotations

import inspect
import json
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deft_plugin.telemetry import FILE_NAME, TRAINING, read_histograms

# Edges and counts by step and tag.
Sent = dict[tuple[int, str], tuple[list[float], list[float]]]


def sent_to_tensorboard(folder: Path) -> Sent:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (directory,) = (folder / "runs").iterdir()
    accumulator = EventAccumulator(str(directory), size_guidance={"histograms": 0})
    accumulator.Reload()
    sent = {}
    for tag in accumulator.Tags()["histograms"]:
        for event in accumulator.Histograms(tag):
            value = event.histogram_value
            edges = [value.min, *value.bucket_limit]
            assert value.num == sum(value.bucket)
            assert value.max == edges[-1]
            sent[event.step, tag] = (edges, list(value.bucket))
    return sent


def sent_to_wandb(folder: Path) -> Sent:
    """From the file that W&B writes offline: LevelDB's log format, with a protocol buffer in each record."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    # In the first run's folder for all runs of a process.
    directory = Path(wandb.run.dir).parent
    wandb.finish()
    (path,) = directory.glob("*.wandb")
    # Another process writes it, and its last block may come after `finish` has returned.
    deadline = time.monotonic() + 60
    while True:
        kept = [Record.FromString(text) for text in records(path.read_bytes()[7:], 7)]
        if kept and kept[-1].WhichOneof("record_type") == "exit":
            break
        assert time.monotonic() < deadline, "W&B's file has no end"
        time.sleep(0.1)
    sent: Sent = {}
    for record in kept:
        items = {tuple(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        for tag in [key[0] for key in items if key[1:] == ("bins",)]:
            step = items[("train/global_step",)]
            sent[step, tag] = (items[tag, "bins"], items[tag, "values"])
    return sent


def records(data: bytes, start: int) -> Iterator[bytes]:
    """Of a log whose blocks of 32 KiB began `start` bytes before."""
    position, whole = 0, b""
    while position < len(data):
        left = 32_768 - (position + start) % 32_768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        # A whole one, or the last part of one.
        if kind in (1, 4):
            yield whole
            whole = b""


def sent_to_trackio(folder: Path) -> Sent:
    (path,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(path) as connection:
        logs = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics")]
    return {
        (log["train/global_step"], name): (value["bins"], value["values"])
        for log in logs
        for name, value in log.items()
        if isinstance(value, dict)
    }


def use_folder(reporter: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a reporter writes in a folder, and it from the network. Skips the test where it is not installed."""
    pytest.importorskip(reporter)
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DIR", str(folder))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    if reporter == "trackio":
        import trackio

        own = [module for name, module in sys.modules.items() if name.startswith("trackio")]
        for name, path in (("TRACKIO_DIR", "trackio"), ("MEDIA_DIR", "trackio/media")):
            for module in [module for module in own if hasattr(module, name)]:
                monkeypatch.setattr(module, name, folder / path)
        if "bucket_id" not in inspect.signature(trackio.init).parameters:
            # transformers' callback passes it, also to 0.19, which Axolotl pins.
            init = trackio.init
            monkeypatch.setattr(trackio, "init", lambda bucket_id, **given: init(**given))


REPORTERS: dict[str, Callable[[Path], Sent]] = {
    "tensorboard": sent_to_tensorboard,
    "wandb": sent_to_wandb,
    "trackio": sent_to_trackio,
}


def assert_sent(reporter: str, folder: Path) -> None:
    """Every histogram in the run's file has reached the reporter on both axes, and nothing else."""
    sent = REPORTERS[reporter](folder)
    assert sent
    for entry in read_histograms(folder / FILE_NAME):
        for name, histogram in entry.histograms.items():
            tag = f"{'train' if entry.split == TRAINING else 'eval'}/{name}"
            for suffix, bins in (("", histogram.linear()), ("_log10", histogram.log10())):
                edges, counts = sent.pop((entry.step, tag + suffix))
                assert edges == pytest.approx(bins[0])
                assert counts == bins[1]
    assert not sent
