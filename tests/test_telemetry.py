"""The file of histograms: whole lines, none twice, whatever happened to the run before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deft_plugin.histograms import EDGES, QUANTITIES, Histogram
from deft_plugin.telemetry import FILE_NAME, TRAINING, LoggedHistograms, Telemetry, read_histograms


def trainer_at(folder: Path, step: int = 0) -> Any:
    """What of a trainer is asked for."""
    return SimpleNamespace(
        args=SimpleNamespace(output_dir=str(folder)),
        state=SimpleNamespace(global_step=step),
        callback_handler=SimpleNamespace(callbacks=[]),
    )


def histograms(count: int = 1) -> dict[str, Histogram]:
    return {name: Histogram((count, *range(1, len(EDGES)))) for name in QUANTITIES}


class Run:
    """A process with a trainer."""

    def __init__(self, folder: Path) -> None:
        self.trainer = trainer_at(folder)
        self.telemetry = Telemetry(self.trainer)

    def begin(self, step: int = 0) -> None:
        self.trainer.state.global_step = step
        self.telemetry.begin_training(step)

    def log(self, *steps: int, split: str = TRAINING, count: int = 1) -> None:
        for step in steps:
            self.trainer.state.global_step = step
            self.telemetry.write(split, histograms(count))


def logged(folder: Path) -> list[tuple[int, str, int]]:
    """Step, split and first count of every line, as they stand in the file."""
    lines = (folder / FILE_NAME).read_text().splitlines()
    entries = read_histograms(folder / FILE_NAME)
    assert len(entries) == len(lines)
    return [(entry.step, entry.split, entry.histograms["gate"].counts[0]) for entry in entries]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = Run(tmp_path / "new" / "folder")
    run.log(3, 5)
    run.log(5, split="eval", count=7)
    assert read_histograms(tmp_path / "new" / "folder" / FILE_NAME) == [
        LoggedHistograms(3, TRAINING, histograms()),
        LoggedHistograms(5, TRAINING, histograms()),
        LoggedHistograms(5, "eval", histograms(7)),
    ]


def test_a_window_without_tokens_is_no_line(tmp_path: Path) -> None:
    Run(tmp_path).telemetry.write(TRAINING, {})
    assert not (tmp_path / FILE_NAME).exists()


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    killed = Run(tmp_path)
    killed.log(0, split="eval")
    killed.begin()
    killed.log(2, 4, 6, 8)
    killed.log(4, 8, split="eval")
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"step": 10, "split": "trai')
    resumed = Run(tmp_path)
    resumed.begin(4)
    resumed.log(6, 8, 10, count=2)
    resumed.log(8, split="eval", count=2)
    assert logged(tmp_path) == [
        *((0, "eval", 1), (2, TRAINING, 1), (4, TRAINING, 1), (4, "eval", 1)),
        *((6, TRAINING, 2), (8, TRAINING, 2), (10, TRAINING, 2), (8, "eval", 2)),
    ]


def test_a_new_run_in_the_folder_of_an_old_one_has_its_own_lines_alone(tmp_path: Path) -> None:
    old = Run(tmp_path)
    old.begin()
    old.log(0, split="eval")
    old.log(2, 4)
    new = Run(tmp_path)
    new.log(0, split="eval_other", count=2)
    new.begin()
    new.log(2, count=2)
    assert logged(tmp_path) == [(0, "eval_other", 2), (2, TRAINING, 2)]


def test_a_second_training_and_a_second_attempt_begin_anew(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log(0, split="eval")
    for count in (1, 2, 3):
        run.begin()
        run.log(2, 4, count=count)
    assert logged(tmp_path) == [(0, "eval", 1), (2, TRAINING, 3), (4, TRAINING, 3)]


def test_an_evaluation_alone_is_added_to_what_a_killed_run_has_left(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin()
    run.log(2)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"step": 4, "split"')
    Run(tmp_path).log(0, split="eval")
    assert logged(tmp_path) == [(2, TRAINING, 1), (0, "eval", 1)]


def test_the_reader_leaves_out_what_is_torn_and_takes_the_last_of_a_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log(0, split="eval")
    run.log(0, split="eval", count=5)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"step": 2')
    (entry,) = read_histograms(tmp_path / FILE_NAME)
    assert entry.histograms["gate"].counts[0] == 5


@pytest.mark.parametrize("line", ["no JSON", "[1]", '{"step": 1}', '{"edges": 1}'])
def test_a_file_of_something_else_is_named_with_the_line(tmp_path: Path, line: str) -> None:
    Run(tmp_path).log(1)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=rf"{FILE_NAME}, line 2: .* is no line of histograms"):
        read_histograms(tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match=rf"{FILE_NAME}.* is no line of histograms"):
        Run(tmp_path).begin(1)


def test_lines_that_end_as_on_windows_are_whole(tmp_path: Path) -> None:
    Run(tmp_path).log(2, 4)
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b'{"step": 6')
    Run(tmp_path).log(0, split="eval")
    assert logged(tmp_path) == [(2, TRAINING, 1), (4, TRAINING, 1), (0, "eval", 1)]


@pytest.mark.parametrize("content", [b"no JSON\n", b"\xff\xfe\x00\n\xff"])
def test_an_old_file_of_something_else_does_not_stop_a_new_run(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    run = Run(tmp_path)
    run.begin()
    run.log(1)
    assert logged(tmp_path) == [(1, TRAINING, 1)]
