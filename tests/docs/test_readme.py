"""The README's first steps, run word for word on a tiny model in place of the hub's, without a GPU."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("bitsandbytes", reason="needs the extra `qlora`")
from peft import PeftModel

import deft_plugin
from deft_plugin import cli
from tests.docs.commands import RUN_BY
from tests.docs.pages import ROOT, blocks, commands
from tests.tiny import tiny_model, tiny_tokenizer

README = ROOT / "README.md"
MODEL = "Qwen/Qwen3-0.6B-Base"
# What the README says to add without a GPU, and as few steps as will do.
ON_A_CPU = "use_cpu=True, bf16=False"
FLAGS_ON_A_CPU = "--use_cpu true --bf16 false"
SHORT = "max_steps=2, logging_steps=1, per_device_train_batch_size=2, report_to='none'"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model under the hub's name, and the data of the README, each of its two formats in turn."""
    tiny_model("qwen3", initializer_range=0.08).save_pretrained(tmp_path / MODEL)
    tiny_tokenizer().save_pretrained(tmp_path / MODEL)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    deft_plugin.unregister()


def write_data(folder: Path, row: str) -> None:
    (folder / "data").mkdir()
    for split in ("train", "test"):
        (folder / "data" / f"{split}.jsonl").write_text(f"{row}\n" * 4)


def rows() -> list[str]:
    (block,) = (block for block in blocks(README) if block.language == "json")
    return block.text.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1], ids=["prompt and completion", "messages"])
def test_from_ones_own_jsonl_to_an_adapter(folder: Path, index: int) -> None:
    row = rows()[index]
    json.loads(row)
    write_data(folder, row)
    (block,) = (block for block in blocks(README) if "trainer.train()" in block.text)
    assert len(block.text.replace("\n\n", "\n").splitlines()) <= 16
    if torch.cuda.is_available():
        start = block.text.replace("SFTConfig(loss", f"SFTConfig({SHORT}, loss")
    else:
        assert f"`{ON_A_CPU}`" in README.read_text()
        start = block.text.replace("SFTConfig(loss", f"SFTConfig({ON_A_CPU}, {SHORT}, loss")
    names: dict[str, object] = {}
    exec(compile(start, str(README), "exec"), names)
    history = names["trainer"].state.log_history  # type: ignore[attr-defined]
    assert all(0 < entry["mean_gate"] <= 1 for entry in history if "mean_gate" in entry)
    assert any("eval_nll" in entry for entry in history)
    # The adapter loads without this package's head, and says something else than the base.
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    ids = torch.randint(5, 100, (1, 6))
    before = base(input_ids=ids).logits
    after = PeftModel.from_pretrained(base, "adapter")(input_ids=ids).logits
    assert after.isfinite().all()
    assert not torch.equal(before, after)


@pytest.mark.slow
def test_deft_against_nll(folder: Path) -> None:
    write_data(folder, rows()[0])
    of_readme = [command.text for command in commands() if command.page == README]
    trainings = [text for text in of_readme if text.startswith("deft sft --model_name_or_path")]
    looks = {command.text for command in commands() if command.text.startswith("deft plot runs/")}
    assert looks & set(of_readme)
    here = f"{FLAGS_ON_A_CPU} --max_steps 2 --logging_steps 1 --eval_steps 1 --report_to none"
    assert f"`{FLAGS_ON_A_CPU}`" in README.read_text()
    assert len(trainings) == 2
    for training in trainings:
        run(f"{training} {here} --save_steps 2")
    for look in looks:
        run(look)
    for run_folder in ("runs/nll", "runs/deft"):
        (state,) = Path(run_folder).glob("checkpoint-2/trainer_state.json")
        evaluations = [
            entry for entry in json.loads(state.read_text())["log_history"] if "eval_nll" in entry
        ]
        assert evaluations
        assert all(math.isfinite(entry["eval_nll"]) for entry in evaluations)
        gates = {entry["eval_mean_gate"] for entry in evaluations}
        assert (gates == {1.0}) == (run_folder == "runs/nll")
    assert list(Path().glob("*.png"))


@pytest.mark.slow
def test_the_quickstarts_file_without_a_gpu(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(folder, rows()[0])
    run_yaml, on_a_cpu = (
        block.text for block in blocks(ROOT / "docs/quickstart.md") if block.language == "yaml"
    )
    Path("run.yaml").write_text(run_yaml + on_a_cpu)
    run("deft doctor run.yaml")
    printed = capsys.readouterr().out
    assert "trains with DEFT()" in printed
    run(
        "deft sft --config run.yaml --max_steps 2 --logging_steps 1 --save_steps 2 --report_to none"
    )
    log = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert 0 < log[0]["mean_gate"] < 1


def test_its_figures_of_a_gpu_are_those_of_the_page_it_names() -> None:
    """Every row of the README's table has the page's times and memory, in the page's columns."""
    (table,) = re.findall(r"^\| H100 \|.*\n\|-.*\n((?:\|.*\n)+)", README.read_text(), re.M)
    shown = {
        re.sub(r" 1\.16's|'s|\*\*", "", name): [
            re.findall(r"[\d,.]*\d (?:ms|MiB)", cell) for cell in cells
        ]
        for name, *cells in map(cells_of, table.splitlines())
    }
    assert len(shown) >= 6
    (table,) = re.findall(
        r"^\| N = 8,192, V = 128,256,.*\n\|-.*\n((?:\|.*\n)+)",
        (ROOT / "docs/gpu.md").read_text(),
        re.M,
    )
    measured = {name.replace("'s", ""): cells for name, *cells in map(cells_of, table.splitlines())}
    for name, (trainable, frozen) in shown.items():
        row = measured[name]
        assert [*trainable, *frozen] == [cell for cell in row[:4] if cell], name


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_the_loss_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = (text for text in RUN_BY if text.startswith("deft benchmark --"))
    run(f"{command} --vocab 131 --hidden 16 --tokens 64 --repetitions 1")
    printed = capsys.readouterr().out
    assert "deft_plugin deft" in printed
    assert "torch cross_entropy" in printed


def run(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "deft"
    status: object = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [program, *arguments])
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
    assert not status, command
