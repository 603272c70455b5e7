"""Which checkpoint `deft sft` goes on from; test_command_line.py has runs that do."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from deft_plugin.trl.resumption import find_checkpoint


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run's folder with two whole checkpoints and one that was killed while it was saved."""
    for step in (9, 10, 11):
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        if step < 11:
            (checkpoint / "trainer_state.json").write_text("{}")
    # The run's log.
    (tmp_path / "out" / "trainer_state.json").write_text("{}")
    return tmp_path / "out"


def find(out: Path, given: object) -> str | None:
    return find_checkpoint(SimpleNamespace(output_dir=str(out), resume_from_checkpoint=given))


def test_the_last_checkpoint_a_named_one_or_none(out: Path) -> None:
    (out / "checkpoint-11").rmdir()
    for word in (True, "true", "True", "YES"):
        assert find(out, word) == str(out / "checkpoint-10")
    assert find(out, str(out / "checkpoint-9")) == str(out / "checkpoint-9")
    for word in (None, False, "false", "no"):
        assert find(out, word) is None


def test_an_empty_name_is_neither_none_nor_a_folder(out: Path) -> None:
    with pytest.raises(ValueError, match=r"^--resume_from_checkpoint is empty\."):
        find(out, "")
    assert find(out, "null") is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("true", "true: the folder '{out}/checkpoint-11' is no whole checkpoint, since it has no trainer_state.json."),
        ("{out}", "{out}: the folder '{out}' is a run's and no checkpoint, as '{out}/checkpoint-11' is."),
        ("{out}/none", "{out}/none: the folder '{out}/none' does not exist."),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_checkpoint_is_named(given: str, message: str, out: Path) -> None:
    said = message.format(out=out)
    said = f"--resume_from_checkpoint {said} Without the option the run begins anew."
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        find(out, given.format(out=out))
