"""`deft plot` from runs' folders to a picture."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs the extra `report`")

from matplotlib.figure import Figure

from tests.runs import write_run

Plot = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plot(deft: Plot) -> Plot:
    """`deft plot` in this process: its exit status, stdout and stderr."""
    return functools.partial(deft, "plot")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that were saved; the pictures are written too."""
    figures: list[Any] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def titles(figure: Figure) -> list[str]:
    return [axis.get_title() or axis.get_title(loc="left") for axis in figure.axes]


def test_a_run_is_drawn_beside_its_log(plot: Plot, tmp_path: Path, drawn: list[Any]) -> None:
    run = write_run(tmp_path / "run")
    status, out, errors = plot(run)
    assert (status, errors) == (0, "")
    assert out == f"Written to {run / 'metrics.png'}\n"
    assert (run / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert "Loss (nats per token)" in titles(drawn[0])


def test_chosen_metrics_alone_are_drawn(plot: Plot, tmp_path: Path, drawn: list[Any]) -> None:
    run = write_run(tmp_path / "run")
    output = tmp_path / "some.svg"
    status, _, errors = plot(run, "--metric", "nll", "--metric", "mean_gate", "--output", output)
    assert status == 0, errors
    assert b"<svg" in output.read_bytes()
    labels = {label for axis in drawn[0].axes for label in axis.get_legend_handles_labels()[1]}
    assert labels == {"nll", "gate"}
    status, _, errors = plot(run, "--metric", "scored_tokens")
    assert (status, errors) == (0, "")
    assert titles(drawn[1]) == ["Scored tokens"]


@pytest.mark.parametrize("names", [["a"], ["a", "b"]], ids=str)
def test_the_pictures_folder_is_made_once_there_is_something_to_draw(
    names: list[str], plot: Plot, tmp_path: Path
) -> None:
    runs = [write_run(tmp_path / name) for name in names]
    output = tmp_path / "new" / "folder" / "x.png"
    assert plot(*runs, "--metric", "nlll", "--output", output)[0] == 2
    assert not (tmp_path / "new").exists()
    status, out, errors = plot(*runs, "--output", output)
    assert (status, errors) == (0, "")
    assert f"Written to {output}\n" in out
    assert output.stat().st_size > 1000


def test_a_choice_of_metrics_leaves_the_picture_of_all(plot: Plot, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    plot(run)
    whole = (run / "metrics.png").read_bytes()
    metrics = ["--metric", "nll", "--metric", "eval_nll", "--metric", "mean_gate"]
    status, out, errors = plot(run, *metrics)
    assert (status, errors) == (0, "")
    assert out == f"Written to {run / 'metrics-nll-mean_gate.png'}\n"
    assert (run / "metrics.png").read_bytes() == whole


def test_no_picture_is_left_in_a_checkpoint_that_a_trainer_deletes(
    plot: Plot, tmp_path: Path
) -> None:
    checkpoint = write_run(tmp_path / "run" / "checkpoint-10")
    for named in (tmp_path / "run", checkpoint, checkpoint / "trainer_state.json"):
        status, out, errors = plot(named)
        assert (status, errors) == (0, "")
        assert out == f"Written to {tmp_path / 'run' / 'metrics.png'}\n"
    assert [each.name for each in checkpoint.iterdir()] == ["trainer_state.json"]


def test_several_runs_are_compared_and_never_by_their_losses(
    plot: Plot, tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [
        write_run(tmp_path / "runs" / name, objective=name, nll=nll)
        for name, nll in (("nll", (2.0, 1.0)), ("deft", (2.0, 1.25)))
    ]
    status, out, errors = plot(*runs)
    assert status == 0, errors
    assert (tmp_path / "deft-plot.png").stat().st_size > 1000
    assert "Written to deft-plot.png" in out
    assert "1.250" in out
    assert "answer_accuracy" in out
    assert "0.750" in out
    assert out.count("1,234") == 2
    assert "scored_tokens" not in out
    (figure,) = drawn
    assert figure.get_suptitle() == "dots: held out (1,234 tokens), thin lines: training"
    assert len(figure.axes) == 5
    # Each has a scale of its own, in two columns.
    for axis in figure.axes:
        assert all(label.get_visible() for label in axis.get_yticklabels())
        assert axis.get_ylabel()
    for axis, is_lowest in zip(figure.axes, (False, False, False, True, True), strict=True):
        assert all(label.get_visible() == is_lowest for label in axis.get_xticklabels())
        assert axis.get_xlabel() == ("optimizer step" if is_lowest else "")
    for axis in figure.axes:
        assert "oss" not in axis.get_title(loc="left")
        for line in axis.get_lines():
            # The losses of `write_run` are 100.
            assert max(line.get_ydata()) < 100
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["nll (nll)", "deft (deft)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "RUN 'none' does not exist. Choices: a run's folder, or a trainer_state.json"),
        (["empty"], "RUN 'empty' has no trainer_state.json"),
        (["."], "RUN '.' has no trainer_state.json, nor a checkpoint-N with one. Choices: a, b, bare, own."),
        (["a", "--metric", "nlll"], "--metric 'nlll' is unknown. Choices: loss, objective_loss, nll"),
        (["own", "--metric", "nll"], "--metric 'nll' was not logged. Of the choices there are: loss"),
        (["a", "b", "--metric", "loss"], "--metric 'loss' of one objective says nothing about that of another. Choices: nll"),
        (["a", "b", "--metric", "scored_tokens"], "--metric 'scored_tokens' is none that several runs are compared by. Choices: nll"),
        (["a", "b", "--metric", "entropy"], "--metric 'entropy' is none that several runs are compared by. Choices: nll"),
        (["own", "own", "--metric", "nll"], "--metric 'nll' was logged by none of the runs. Of the choices there are: none"),
        (["own", "own"], "has logged one of: nll, mean_token_accuracy"),
        (["a", "--output", "x.txt"], "--output 'x.txt' has no suffix of a picture. Choices: "),
        (["a", "--output", "a/trainer_state.json/x.png"], "--output 'a/trainer_state.json/x.png' cannot be written"),
        (["a", "b", "--output", "a/trainer_state.json/x.png"], "--output 'a/trainer_state.json/x.png' cannot be written"),
        (["bare"], "The log has no metrics to plot, only step, train_runtime"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_told_in_one_line(
    arguments: list[str],
    message: str,
    plot: Plot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a", "b"):
        write_run(tmp_path / name)
    for name, entry in (("own", {"loss": 2.0}), ("bare", {"train_runtime": 1.0})):
        (tmp_path / name).mkdir()
        state = {"log_history": [{"step": 1, **entry}]}
        (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
    status, out, errors = plot(*arguments)
    assert (status, out) == (2, "")
    assert errors.startswith("deft plot: ")
    assert errors.count("\n") == 1
    assert message in errors


def test_a_checkpoints_log_without_the_last_evaluation_is_told(plot: Plot, tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path / "run" / "checkpoint-10")
    assert plot(tmp_path / "run")[2] == ""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "global_step": 15}))
    status, _, errors = plot(tmp_path / "run")
    assert status == 0
    assert errors.startswith(
        "deft plot: run: the log of checkpoint-10 has no evaluation after step 10 of 15; "
    )
    # A run's own log ends where the run has ended.
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({**state, "global_step": 15}))
    assert plot(tmp_path / "run")[2] == ""
