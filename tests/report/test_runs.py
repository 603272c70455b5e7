"""Logs of runs: where they are found, what is compared, and what is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from deft_plugin.report.runs import compared_metrics, figures_of, load_run, load_runs
from tests.runs import write_run


def test_a_run_is_found_by_its_folder_its_file_or_its_newest_checkpoint(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole")
    assert load_run(str(whole)).path == load_run(str(whole / "trainer_state.json")).path
    for step, nll in ((90, 3.0), (100, 0.5)):
        write_run(tmp_path / "run" / f"checkpoint-{step}", nll=(nll,))
    found = load_run(str(tmp_path / "run"))
    assert found.path.parent.name == "checkpoint-100"
    assert found.name == "run"


def test_results_beside_the_log_name_the_objective_and_the_task(tmp_path: Path) -> None:
    run = load_run(str(write_run(tmp_path / "run", objective="deft", eval_pass_at_16=0.25)))
    assert run.objective == "deft"
    # Nor is the number of tokens a figure of the task.
    assert run.task == {"pass_at_16": 0.25, "answer_accuracy": 0.75}


def test_runs_are_compared_by_nll_and_never_by_their_losses(tmp_path: Path) -> None:
    run = load_run(str(write_run(tmp_path / "run", nll=(3.0, 1.0, 2.0))))
    line = figures_of(run)
    assert line.held_out
    assert (line.nll_first, line.nll_best, line.nll_last) == (3.0, 1.0, 2.0)
    assert not any("loss" in name for name in (*line.last, *line.task))
    assert 100.0 not in (*line.last.values(), *line.task.values())
    assert line.last["mean_gate"] == pytest.approx(0.6)
    assert "mean_gate" in compared_metrics([run])
    assert line.held_out_tokens == 1234
    assert "scored_tokens" not in (*line.last, *compared_metrics([run]))


def write_log(folder: Path, entries: list[dict[str, Any]], loss_type: str | None) -> str:
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    if loss_type:
        (folder / "results.json").write_text(json.dumps({"loss_type": loss_type}))
    return str(folder)


def test_several_evaluation_sets_have_figures_and_no_losses(tmp_path: Path) -> None:
    metrics = {
        "nll": 1.0,
        "loss": 2.0,
        "objective_loss": 3.0,
        "runtime": 4.0,
        "accuracy": 0.5,
        "scored_tokens": 9,
    }
    entry = {f"eval_{part}_{name}": metrics[name] for part in ("a", "b") for name in metrics}
    run = load_run(write_log(tmp_path / "run", [{"step": 1, **entry}], None))
    assert run.task == {f"{part}_{name}": metrics[name] for part in ("a", "b") for name in ("nll", "accuracy")}  # fmt: skip


def test_the_best_is_the_best_of_the_numbers(tmp_path: Path) -> None:
    entries = [{"step": n, "eval_nll": nll} for n, nll in enumerate((math.nan, 2.0, 3.0, math.nan))]
    line = figures_of(load_run(write_log(tmp_path / "run", entries, None)))
    assert line.nll_best == 2.0
    assert line.nll_last is not None
    assert math.isnan(line.nll_last)


def test_trl_s_own_nll_is_logged_as_a_loss(tmp_path: Path) -> None:
    """And only where the objective is known to be nll is it one."""
    entries = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.5}]
    for loss_type, expected in (("nll", 1.5), ("dft", None), (None, None)):
        run = load_run(write_log(tmp_path / str(loss_type), entries, loss_type))
        assert figures_of(run).nll_last == expected
        assert figures_of(run).held_out_tokens is None


def test_trl_s_own_nll_without_evaluations(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 10**400}, {"step": True, "loss": 1.0}]
    state = {"global_step": 2, "log_history": history}
    (path / "trainer_state.json").write_text(json.dumps(state))
    (path / "objective.json").write_text(json.dumps({"loss_type": "nll"}))
    # A number that no float holds is none, nor is a step that is no number.
    assert load_run(str(path)).training("nll") == {1.0: 2.0}


def test_parameters_of_an_objective_are_named(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    state = {"global_step": 1, "log_history": [{"step": 1, "loss": 2.0, "objective_loss": 2.0}]}
    (path / "trainer_state.json").write_text(json.dumps(state))
    record = {"loss_type": "alpha", "loss_kwargs": {"a": 0.25, "path": "chunked"}}
    (path / "objective.json").write_text(json.dumps(record))
    assert load_run(str(path)).objective == "alpha (a=0.25, path=chunked)"


def test_a_run_without_evaluation_is_told_as_training(tmp_path: Path) -> None:
    run = load_run(
        write_log(
            tmp_path / "run", [{"step": 1, "nll": 2.0, "mean_gate": 0.5, "scored_tokens": 9}], None
        )
    )
    line = figures_of(run)
    assert not line.held_out
    assert line.held_out_tokens is None
    assert (line.nll_last, line.last) == (2.0, {"mean_gate": 0.5})


def test_names_differ(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / seed / "run") for seed in ("seed1", "seed2")]
    names = [run.name for run in load_runs([str(path) for path in paths])]
    assert names == ["seed1/run", "seed2/run"]
    twice = load_runs([str(paths[0])] * 2)
    assert [run.name for run in twice] == ["run (1)", "run (2)"]


def test_logs_of_other_names_are_named_by_them(tmp_path: Path) -> None:
    state = write_run(tmp_path / "run") / "trainer_state.json"
    paths = [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "other" / "b.json"]
    paths[2].parent.mkdir()
    for path in paths:
        path.write_text(state.read_text())
    assert load_run(str(paths[0])).name == "a"
    assert [run.name for run in load_runs([*map(str, paths[:2])])] == ["a", "b"]
    names = [run.name for run in load_runs([*map(str, paths)])]
    assert names == [f"{tmp_path.name}/a", f"{tmp_path.name}/b", "other/b"]
    assert [run.name for run in load_runs([str(state), str(paths[1])])] == ["run", "b"]


def test_runs_in_a_folder_of_runs_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "nll")
    write_run(tmp_path / "deft" / "checkpoint-10")
    write_run(tmp_path / "torn" / "checkpoint-last")
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match=r"has no trainer_state\.json") as refusal:
        load_run(str(tmp_path))
    assert str(refusal.value).endswith(f"Choices: {tmp_path / 'deft'}, {tmp_path / 'nll'}.")
    for name in ("deft", "nll"):
        load_run(str(tmp_path / name))


def test_what_is_no_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_model.safetensors").touch()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "else.json").write_text("{}")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "steps.json").write_text('{"log_history": [], "global_step": [1]}')
    for name, message in (
        ("none", "does not exist. Choices: a run's folder, or a trainer_state.json"),
        ("empty", "has no trainer_state.json.*It has: nothing"),
        ("other", r"has no trainer_state.json.*It has: adapter_model\.safetensors"),
        ("broken.json", "cannot be read as JSON"),
        ("list.json", "is no list.json of a trainer's"),
        ("else.json", "no log_history"),
        ("deep.json", "cannot be read as JSON"),
        ("steps.json", r"global_step is \[1\]; it must be a whole number"),
    ):
        with pytest.raises(ValueError, match=f"--compare .*{name}.*{message}"):
            load_run(str(tmp_path / name))
