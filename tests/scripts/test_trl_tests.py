"""The stand-ins for the hub have the form that is asked for, and the comparison tells what differs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import local_hub
import pytest
import trl_tests
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import is_conversational

CASES = """
import pytest
from datasets import load_dataset
from trl import SFTConfig
from trl.trainer.sft_trainer import _of_another_version


def arguments(tmp_path, **options):
    return SFTConfig(output_dir=str(tmp_path), report_to="none", **options)


def test_needs_trls_own_loss(tmp_path):
    assert arguments(tmp_path).loss_type != "deft", "It is deft."


def test_asks_for_it(tmp_path):
    assert arguments(tmp_path, loss_type="dft").loss_type == "dft"


def test_needs_the_objective(tmp_path):
    assert arguments(tmp_path).loss_type == "deft"


def test_of_another_version():
    _of_another_version()


def test_data():
    assert len(load_dataset("trl-internal-testing/zen", "standard_language_modeling", split="test")) == 2
"""


def test_outcomes_without_the_plugin_and_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "tests").mkdir(parents=True)
    (checkout / "tests" / "__init__.py").touch()
    (checkout / trl_tests.FILE).write_text(CASES)
    monkeypatch.setattr(trl_tests, "make_hub", lambda cache: {"a/model": "ImportError: no"})

    def compared(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            trl_tests.main(SimpleNamespace(args=[*arguments]), checkout)  # type: ignore[arg-type]
        return int(end.value.code or 0), capsys.readouterr().out

    status, said = compared()
    assert status == 1
    assert "not made: a/model (ImportError: no)" in said
    assert "without the plugin: 1 failed, 3 passed, 1 skipped" in said
    assert "loss_type='deft': 1 failed, 3 passed, 1 skipped" in said
    assert "passes without the plugin only: test_needs_trls_own_loss: AssertionError: It is" in said
    assert "passes with the plugin only: test_needs_the_objective" in said

    given = []

    def run(checkout: Path, cache: Path, loss: str, arguments: list[str]) -> dict[str, Any]:
        given.append(arguments)
        return {"test_data": ("passed", "")}

    monkeypatch.setattr(trl_tests, "run", run)
    assert compared("-k", "asks or data")[0] == 0
    assert given == [["-k", "asks or data"]] * 2


@pytest.mark.parametrize("name", [name for name in local_hub.SETS if "image" not in name])
def test_data_sets_are_in_trls_formats(name: str) -> None:
    for config in local_hub.SETS[name]():
        path = f"{local_hub.ORGANIZATION}/{name}"
        splits = local_hub.load_dataset(path, config)
        assert {key: len(part) for key, part in splits.items()} == {"train": 17, "test": 2}
        row = local_hub.load_dataset(path, config, split="train[:3]")[2]
        assert is_conversational(row) == ("standard" not in config)
        stream: Any = local_hub.load_dataset(path, config, split="train", streaming=True)
        assert list(stream)[2] == row


def test_unknown_data_set() -> None:
    with pytest.raises(FileNotFoundError, match="zen"):
        local_hub.load_dataset("stanfordnlp/imdb", split="train")


@pytest.mark.parametrize("name", ["tiny-Qwen2ForCausalLM-2.5", "tiny-GPTNeoXForCausalLM"])
def test_model_and_tokenizer_load_as_they_are_asked_for(tmp_path: Path, name: str) -> None:
    local_hub.make_text_model(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(model).__name__ == name.removeprefix("tiny-").partition("-")[0]
    assert len(tokenizer) <= model.config.vocab_size
    assert (tokenizer.chat_template is None) == ("NeoX" in name)
    assert tokenizer.decode(tokenizer("Übermut tut selten gut.")["input_ids"]).startswith("Über")
