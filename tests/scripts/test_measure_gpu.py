"""One command runs all of a GPU's measurements, and once more only what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

measure_gpu = pytest.importorskip("measure_gpu", reason="needs the extra `scripts`")

# A part's command is Python's arguments.
COUNTED = "import pathlib, sys; file = pathlib.Path({!r}); file.write_text(file.read_text() + 'x')"


def test_the_parts_are_in_order_and_cover_all_shapes() -> None:
    parts = measure_gpu.parts("cuda", None, 9, 8, ["tests/ops"])
    names = [part.name for part in parts]
    assert names[0] == "tests"
    assert names[-2:] == ["profile", "step"]
    assert len(set(names)) == len(names)
    for name in ("loss-8192-128257-4096", "loss-65536-128256-4096-masked"):
        assert name in names[1:-2]
    for part in parts[1:]:
        script, *arguments = part.command
        assert Path(script).exists()
        assert arguments[arguments.index("--device") + 1] == "cuda"


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two parts, of which the first only counts its runs, and the second fails."""
    counter = tmp_path / "count"
    counter.write_text("")
    script = COUNTED.format(str(counter))
    monkeypatch.setattr(
        measure_gpu,
        "parts",
        lambda *arguments: [
            measure_gpu.Part("tests", ["-c", script]),
            measure_gpu.Part("step", ["-c", "raise SystemExit('no memory')"]),
        ],
    )
    return counter


def test_what_succeeded_is_not_run_again(
    counting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> str:
        options = ["--device", "cpu", "--output", str(tmp_path / "results")]
        result = CliRunner().invoke(measure_gpu.app, [*options, *arguments])
        assert result.exit_code == (0 if "tests" in arguments else 1)
        return result.output

    said = run()
    assert "Failed: step" in said
    assert "no memory" in said
    assert counting.read_text() == "x"
    record = json.loads((tmp_path / "results" / "tests" / "done.json").read_text())
    assert record["card"] == "cpu"
    assert "trl" in record["packages"]
    assert record["seconds"] >= 0
    assert not (tmp_path / "results" / "step" / "done.json").exists()

    assert "tests: done before" in run()
    assert counting.read_text() == "x"
    run("--again", "--only", "tests")
    assert counting.read_text() == "xx"
    # Figures of other code are not these.
    monkeypatch.setattr(measure_gpu, "SOURCES", ("docs",))
    assert "done before" not in run("--only", "tests")
    assert counting.read_text() == "xxx"


def test_an_unknown_part_is_refused(counting: Path, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--output", str(tmp_path), "--only", "losses"]
    result = CliRunner().invoke(measure_gpu.app, options)
    assert result.exit_code == 2
    assert "tests" in result.output


@pytest.mark.slow
def test_a_rehearsal_on_a_cpu_fills_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `scripts`")
    options = ["--device", "cpu", "--output", str(tmp_path), "--shape", "64,131,16"]
    options += ["--repetitions", "1", "--tests", "tests/scripts/test_data_files.py"]
    result = CliRunner().invoke(measure_gpu.app, [*options, "--only", "tests", "--only", "profile"])
    assert result.exit_code == 0, result.output
    assert "passed" in (tmp_path / "tests" / "log.txt").read_text()
    assert (tmp_path / "profile" / "frozen.csv").exists()
