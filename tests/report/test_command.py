"""`deft report` from the command line to the files that it leaves."""

from __future__ import annotations

import csv
import fnmatch
import importlib.resources
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BartConfig, T5Config, T5ForConditionalGeneration, ViTConfig

from deft_plugin import cli
from deft_plugin.cli import errors as errors_of_commands
from deft_plugin.cli.report import several_to_an_option
from deft_plugin.report import checkpoint
from deft_plugin.report.checkpoint import Checkpoint, check_same_vocabulary
from deft_plugin.report.choices import DEFAULT_OBJECTIVES
from deft_plugin.report.report import Options
from tests.runs import write_run
from tests.tiny import tiny_model, tiny_tokenizer

from .conftest import BASE_DATA, BASE_MODEL, ROOT, write_rows

if sys.version_info >= (3, 11):
    import tomllib

Run = Callable[..., tuple[int, str]]

pytestmark = pytest.mark.usefixtures("quick_drawing")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter for `model` that changes it."""
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny_model("llama"), lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_the_shipped_model_and_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(BASE_MODEL), "--data", str(BASE_DATA), "--rows", "6"]
    monkeypatch.setattr(sys, "argv", ["deft", "report", *arguments, "--output", str(tmp_path)])
    cli.main()
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    written = numbers(tmp_path)
    tokens, rows = table(tmp_path / "tokens.csv"), table(tmp_path / "rows.csv")
    assert len(tokens) == written["standing"]["tokens"] == written["sample"]["tokens"]
    assert len(rows) == 6
    assert [each["objective"] for each in written["objectives"]] == [*DEFAULT_OBJECTIVES]
    # The most silenced first.
    gates = [float(line["gate_deft"]) for line in tokens]
    assert gates == sorted(gates)
    means = [float(line["mean_gate_deft"]) for line in rows]
    assert means == sorted(means)
    for line in tokens[:20]:
        p, focus = float(line["p"]), float(line["focus"])
        assert float(line["gate_deft"]) == pytest.approx(p**focus, rel=1e-3)
        assert json.loads(line["token"])
    assert sum(float(line["p"]) for line in tokens) / len(tokens) == pytest.approx(
        written["standing"]["mean_probability"], rel=1e-4
    )
    pictures = {path.name for path in (tmp_path / "figures").iterdir()}
    names = ("regimes", "distributions", "shares", "gates", "gradients")
    assert pictures == {f"{name}{dress}.png" for name in names for dress in ("", "-dark")}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    # It has never spelled a word backward, and does not know that.
    gap = written["standing"]["mean_focus"] - written["standing"]["mean_probability"]
    assert gap > 0.15
    assert "Settled, but on something else" in page
    assert "The mean focus is not well above" not in page
    # The warning says how much the gate leaves out of what is new.
    effects = {each["objective"]: each for each in written["objectives"]}
    closed, of_nll = (effects["deft"][name] for name in ("closed_share", "closed_share_of_nll"))
    assert (
        f"Under <code>deft</code> {100 * closed:.1f} % of the tokens, with {100 * of_nll:.0f} % of nll's gradient, would "
        "be as good as left out: wrong labels, and also what is new to the model"
    ) in " ".join(page.split())
    # No more than that is said of gates in general: not all of them leave out what is new.
    lowest = {name: each["gradient_by_band"][0] for name, each in effects.items()}
    assert max(lowest["p"], lowest["deft"]) < lowest["nll"] < lowest["cayley"]
    assert effects["cayley_trans"]["closed_share"] < 0.01 < 0.3 < closed
    assert "The gates of p and DEFT keep what the model believes in either case" in page
    assert "the gates of p and DEFT move the weight to the right" in page
    for general in (
        "objectives with a gate",
        "a gated objective keeps",
        "a gate moves",
        "knows the task",
    ):
        assert general not in page
    for option in ("--after CHECKPOINT", "--run RUN", "--compare RUN RUN"):
        assert option in page, "a hint where something is absent"


def test_everything_at_once(
    model: Path, adapter: Path, pairs: Path, tmp_path: Path, run: Run
) -> None:
    runs = [write_run(tmp_path / name, objective=name) for name in ("deft", "dft")]
    output = tmp_path / "out"
    status, errors = run(
        model, "--data", pairs, "--output", output, "--adapter", adapter, "--after", model,
        "--run", runs[0], "--compare", *runs, "--objectives", "nll,alpha", "--objective", "eaft",
        "--rows", 5, "--max-length", 0, "--batch-size", 2, "--seed", 3, "--dtype", "float32", "--device", "cpu",
    )  # fmt: skip
    assert status == 0, errors
    written = numbers(output)
    assert [each["objective"] for each in written["objectives"]] == ["nll", "alpha", "eaft"]
    assert written["model"] == f"{model.name} + {tmp_path.name}/adapter"
    assert written["after"] == model.name
    assert [each["name"] for each in written["runs"]] == ["deft", "dft"]
    assert [each["task"] for each in written["runs"]] == [{"answer_accuracy": 0.75}] * 2
    lines = table(output / "tokens.csv")
    mean = sum(float(line["p_after"]) for line in lines) / len(lines)
    assert mean == pytest.approx(written["standing_after"]["mean_probability"], rel=1e-4)
    assert mean != pytest.approx(written["standing"]["mean_probability"], rel=1e-4)
    names = {path.name for path in (output / "figures").iterdir()}
    assert {"changes.png", "before_after.png", "training.png", "compare_nll.png"} <= names
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Needs a second checkpoint" not in page
    assert "never by their own losses" in page


def test_an_adapter_is_measured_as_peft_runs_it(
    model: Path, adapter: Path, pairs: Path, tmp_path: Path, run: Run
) -> None:
    """The same figures from the adapter after the model, and with it from the start."""
    after, start = tmp_path / "after", tmp_path / "start"
    assert run(model, "--data", pairs, "--output", after, "--after", adapter)[0] == 0
    assert run(model, "--data", pairs, "--output", start, "--adapter", adapter)[0] == 0
    assert numbers(after)["standing_after"] == numbers(start)["standing"]


def test_runs_alone_need_no_model(tmp_path: Path, run: Run) -> None:
    runs = [write_run(tmp_path / name) for name in ("$a_{", "_b<i>")]
    output = tmp_path / "out"
    status, errors = run("--compare", *runs, "--output", output)
    assert status == 0, errors
    assert {path.name for path in output.iterdir()} == {"report.html", "report.json", "figures"}
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "<h1>Runs compared</h1>" in page
    assert "_b&lt;i&gt;" in page
    assert "<i>" not in page
    assert page.count('<td class="number">1,234</td>') == 2
    assert "deft report MODEL --data DATA" in page


def test_a_model_in_four_bits(pairs: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("bitsandbytes")
    means = []
    for name, options in (("whole", []), ("four bits", ["--four-bit"])):
        status, errors = run(BASE_MODEL, "--data", pairs, "--output", tmp_path / name, *options)
        assert status == 0, errors
        means.append(numbers(tmp_path / name)["standing"]["nll"])
    assert 0 < abs(means[0] - means[1]) < 0.3 * means[0]


def test_the_last_rows_are_left_to_the_files(
    model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deft_plugin.report.page.MOST_TOKENS", 30)
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"ten chars {i}"} for i in range(9)])
    assert run(model, "--data", data, "--output", tmp_path / "out")[0] == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<article") == 2
    assert "The 2 most silenced rows of 9" in page
    assert len(table(tmp_path / "out" / "rows.csv")) == 9


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet", "saved"])
def test_data_in_a_file_or_a_folder(format: str, model: Path, tmp_path: Path, run: Run) -> None:
    data = Dataset.from_list([{"question": f"{i}?", "answer": f"{i}!"} for i in range(4)])
    path = tmp_path / (f"data.{format}" if format != "saved" else "data")
    {
        "jsonl": data.to_json,
        "csv": data.to_csv,
        "parquet": data.to_parquet,
        "saved": data.save_to_disk,
    }[format](path)
    output = tmp_path / "out"
    status, errors = run(model, "--data", path, "--columns", "question,answer", "--output", output)
    assert status == 0, errors
    assert numbers(output)["sample"]["tokens"] == 4 * 3


ODD: dict[str, list[dict[str, Any]]] = {
    "one row of one token": [{"prompt": "x", "completion": ""}],
    "rows without a label among others": [
        {"prompt": "a very long prompt that fills it all", "completion": "y"},
        {"prompt": "x", "completion": "y"},
    ],
    "messages of several turns": [
        {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant") * 2]}
    ],
    "unknown characters": [{"text": "🦩 日本 \u202e\u0000 e\u0301"}],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_data(name: str, model: Path, tmp_path: Path, run: Run) -> None:
    data = write_rows(tmp_path / "odd.jsonl", ODD[name])
    output = tmp_path / "out"
    status, errors = run(
        model, "--data", data, "--output", output, "--max-length", 32, "--after", model
    )
    assert status == 0, errors
    written = numbers(output)
    page = (output / "report.html").read_text(encoding="utf-8")
    if name == "one row of one token":
        assert written["standing"]["tokens"] == 1
        assert written["standing"]["mean_focus_error"] is None
    if name == "rows without a label among others":
        assert written["sample"]["rows_without_a_token_to_train_on"] == [0]
        assert "1 of the 2 rows drawn have no token to train on within 32 tokens" in page


def test_a_model_that_is_certain_of_everything(
    model: Path, pairs: Path, tmp_path: Path, run: Run
) -> None:
    """p is 1 for each token: nothing to learn, and no share of nothing."""
    certain = tiny_model("llama")
    with torch.no_grad():
        certain.lm_head.weight.zero_()
    certain.save_pretrained(tmp_path / "certain")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "certain")
    from deft_plugin.report import measured as module
    from deft_plugin.report.measurement import statistics_of_logits

    def measure(model: Any, rows: Any, **options: Any) -> Any:
        found = real(model, rows, **options)
        logits = torch.full((len(found), 128), -torch.inf)
        logits[torch.arange(len(found)), found.target] = 0.0
        tokens = statistics_of_logits(logits, found.target, options["top_ks"])
        return type(found)(
            row=found.row, position=found.position, target=found.target, **vars(tokens)
        )

    real = module.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure", measure)
        status, errors = run(
            tmp_path / "certain", "--data", pairs, "--after", model, "--output", tmp_path / "out"
        )
    assert status == 0, errors
    written = numbers(tmp_path / "out")
    assert written["standing"]["mean_probability"] == 1
    assert [each["gradient_by_band"] for each in written["objectives"]] == [None] * 7
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "The mean focus is not well above the mean probability" in page
    assert "Settled, but on something else" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "There is nothing to report on. Name a MODEL and --data DATA, or runs"),
        (["{model}"], "MODEL '{model}' needs data to be measured on: --data"),
        (["--data", "x"], "--data 'x' needs a MODEL"),
        (["--after", "x", "--compare", "y"], "--after 'x' needs a MODEL"),
        (["none", "--data", "{data}"], "MODEL 'none' is neither a model's folder nor"),
        (["{model}", "--data", "none.jsonl"], "--data 'none.jsonl' cannot be loaded"),
        (["{model}", "--data", "{data}", "--columns", "q,a"], "--columns 'q,a' must be one or two"),
        (["{model}", "--data", "{data}", "--split", "dev"], "--split 'dev' is not in '{data}'. Choices: train"),
        (["{model}", "--data", "{data}", "--config", "c"], "--config is 'c'"),
        (["{model}", "--data", "{data}", "--objectives", "nll,deff"], "--objectives 'deff' is unknown. Choices: nll"),
        (["{model}", "--data", "{data}", "--objective", "deff"], "--objective 'deff' is unknown. Choices: nll"),
        (["{model}", "--data", "{data}", "--adapter", "{model}"], "--adapter '{model}' is no adapter"),
        (["{model}", "--data", "{data}", "--after", "none"], "--after 'none' is neither an adapter"),
        (["{model}", "--data", "{data}", "--after", "{base}"], "--after '{base}' has another vocabulary"),
        (["{model}", "--data", "{data}", "--max-length", "1"], "none of the 12 rows drawn has a token to train on within --max-length 1"),
        (["{model}", "--data", "{data}", "--dtype", "int8"], "--dtype 'int8' is unknown. Choices: float32"),
        (["{model}", "--data", "{data}", "--device", "tpu9"], "--device 'tpu9' cannot be used"),
        (["{model}", "--data", "{data}", "--run", "none"], "--run 'none' does not exist"),
        (["{model}", "--data", "{data}", "--compare", "{model}"], "--compare '{model}' has no trainer_state.json"),
        (["{model}", "--data", "{data}", "--chat-template", "no.jinja"], "--chat-template 'no.jinja'"),
        (["{model}", "--data", "{data}", "--device", "meta"], "--device 'meta' cannot be used"),
        (["{model}", "--data", "{data}", "--chat-template", "{model}/model.safetensors"], "--chat-template '{model}/model.safetensors': 'utf-8'"),
        (["{model}", "--data", "{data}", "--output", "{data}"], "--output '{data}' is no folder to write to"),
        (["{model}", "--data", "empty.jsonl"], "--data 'empty.jsonl' has no rows"),
        (["{model}", "--data", "zipped.jsonl"], "--data 'zipped.jsonl' cannot be loaded"),
        (["{model}", "--data", "torn.jsonl"], "--data 'torn.jsonl' cannot be loaded: torn.jsonl, line"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_one_line(
    arguments: list[str], message: str, model: Path, pairs: Path, run: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "zipped.jsonl").write_bytes(b"\x1f\x8b\x08\x00")
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"text": ')
    names = {"model": str(model), "data": str(pairs), "base": str(BASE_MODEL)}
    status, errors = run(*(argument.format(**names) for argument in arguments))
    last = errors.strip().splitlines()[-1]
    assert status == 2
    assert last.startswith("deft report: ")
    assert message.format(**names) in last


NO_MODEL = "is neither a model's folder nor a model on the hub"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("empty", f"MODEL 'empty' {NO_MODEL}: the folder is empty. Expected: a folder with config.json"),
        ("no_config", f"MODEL 'no_config' {NO_MODEL}: the folder has no config.json. Expected: a folder with config.json"),
        ("./none", f"MODEL './none' {NO_MODEL}: there is no such folder. Expected: a folder with config.json"),
        ("owner/none", f"MODEL 'owner/none' {NO_MODEL}: it was not downloaded before, and the hub may not be asked (HF_HUB_OFFLINE"),
        ("no_tokenizer", "MODEL 'no_tokenizer' has no tokenizer that can be loaded. Expected: tokenizer.json and"),
        ("no_tokens", "MODEL 'no_tokens': The tokenizer has 1 tokens, and none but special ones: the model's folder lacks the tokenizer's files"),
        ("t5", "MODEL 't5' is an encoder-decoder (T5Config), which the objectives here do not cover"),
        ("bart", "MODEL 'bart' is an encoder-decoder (BartConfig), which the objectives here do not cover"),
        ("vit", "MODEL 'vit' is no causal language model: transformers has none with its configuration, ViTConfig. Name a decoder-only"),
    ],
)  # fmt: skip
def test_a_model_that_is_none_is_told_in_one_line_before_rows_are_prepared(
    named: str, message: str, model: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(model, tmp_path / "no_config")
    (tmp_path / "no_config" / "config.json").unlink()
    tiny_model("llama").config.save_pretrained(tmp_path / "no_tokenizer")
    # Of which transformers makes a tokenizer without them.
    tiny_model("qwen3").config.save_pretrained(tmp_path / "no_tokens")
    sizes = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8}
    T5ForConditionalGeneration(T5Config(vocab_size=128, **sizes)).save_pretrained(tmp_path / "t5")
    # Of which transformers has a decoder's half, too.
    BartConfig(vocab_size=128).save_pretrained(tmp_path / "bart")
    ViTConfig().save_pretrained(tmp_path / "vit")
    for folder in ("t5", "bart", "vit"):
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    status, errors = run(named, "--data", "none.jsonl")
    assert status == 2
    assert message in errors
    assert errors.strip().count("\n") == 0
    assert len(errors) < 350
    assert "https://" not in errors
    assert ("Name a decoder-only model (Llama, Qwen" in errors) == (named in ("t5", "bart", "vit"))


def test_after_and_a_model_under_an_adapter_are_named_as_they_were_given(
    model: Path, adapter: Path, pairs: Path, run: Run, tmp_path: Path
) -> None:
    T5Config().save_pretrained(tmp_path / "t5")
    status, errors = run(model, "--data", pairs, "--after", tmp_path / "t5")
    assert status == 2
    assert f"--after '{tmp_path}/t5' is an encoder-decoder" in errors
    status, errors = run(tmp_path / "t5", "--data", pairs, "--adapter", adapter)
    assert status == 2
    assert f"MODEL '{tmp_path}/t5' is an encoder-decoder" in errors
    (tmp_path / "empty").mkdir()
    status, errors = run(model, "--data", pairs, "--after", tmp_path / "empty")
    assert status == 2
    assert f"--after '{tmp_path}/empty' is neither an adapter nor a model's folder" in errors
    assert (
        "the folder is empty. Expected: a folder with config.json or adapter_config.json" in errors
    )


def test_a_tokenizer_with_more_tokens_than_the_model(pairs: Path, run: Run, tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    status, errors = run(tmp_path / "model", "--data", pairs, "--output", tmp_path / "out")
    assert status == 2
    assert "outside the model's vocabulary [0, 16)" in errors


def test_a_checkpoint_without_a_tokenizer_is_compared_by_its_size(
    model: Path, tmp_path: Path
) -> None:
    tiny_model("qwen3").config.save_pretrained(tmp_path / "same")
    tiny_model("qwen3", vocab_size=96).config.save_pretrained(tmp_path / "smaller")
    tokenizer = tiny_tokenizer()
    check_same_vocabulary(tokenizer, str(model), Checkpoint(str(tmp_path / "same")))
    with pytest.raises(ValueError, match=r"another vocabulary \(96 tokens\) than MODEL \(128"):
        check_same_vocabulary(tokenizer, str(model), Checkpoint(str(tmp_path / "smaller")))


def test_an_adapter_named_as_the_model_is_loaded_on_its_base_model(
    model: Path, adapter: Path, pairs: Path, run: Run, tmp_path: Path
) -> None:
    config = adapter / "adapter_config.json"
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": str(model)}
    config.write_text(json.dumps(settings))
    tiny_tokenizer().save_pretrained(adapter)
    means = []
    for arguments in ((adapter,), (model, "--adapter", adapter)):
        output = tmp_path / f"out{len(means)}"
        status, errors = run(*arguments, "--data", pairs, "--rows", 4, "--output", output)
        assert status == 0, errors
        means.append(numbers(output)["standing"]["nll"])
    assert means[0] == pytest.approx(means[1])


def test_the_output_is_looked_at_before_a_model_is_loaded(
    model: Path, pairs: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.Placement, "load", None)
    status, errors = run(model, "--data", pairs, "--output", pairs)
    assert status == 2
    assert "is no folder to write to" in errors


def test_what_is_in_the_way_of_a_file_is_named(
    model: Path, pairs: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "out" / "tokens.csv").mkdir(parents=True)
    status, errors = run(model, "--data", pairs, "--rows", 2, "--output", tmp_path / "out")
    assert status == 2
    assert "is no folder to write to" in errors
    assert "tokens.csv" in errors


def test_a_checkpoint_without_all_of_its_weights_is_refused(
    model: Path, pairs: Path, tmp_path: Path, run: Run
) -> None:
    """The rest would be random, and so the report."""
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    weights = load_file(copy / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    status, errors = run(copy, "--data", pairs, "--output", tmp_path / "out")
    assert status == 2
    assert "lacks 1 of its weights (lm_head.weight), which would be random" in errors
    (copy / "model.safetensors").write_bytes(b"torn")
    status, errors = run(copy, "--data", pairs, "--output", tmp_path / "out")
    assert status == 2
    assert "cannot be loaded as a causal language model" in errors


@pytest.mark.parametrize("option", ["--adapter", "--after"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "the peft_type in its adapter_config.json is None, and PEFT"),
        ("[]", "the peft_type in its adapter_config.json is None, and PEFT"),
        ("3", "the peft_type in its adapter_config.json is None, and PEFT"),
        ('{"peft_type": "LORRA"}', "the peft_type in its adapter_config.json is 'LORRA', and PEFT"),
        ('{"peft_type": ["LORA"]}', "the peft_type in its adapter_config.json is ['LORA'], and PEFT"),
        ("{", "its adapter_config.json cannot be read"),
        ("[" * 100_000, "its adapter_config.json cannot be read"),
        ('{"peft_type": "LORA", "r": "x", "target_modules": ["q_proj"]}', "is no adapter for"),
    ],
    ids=lambda content: content[:40],
)  # fmt: skip
def test_an_adapter_that_is_none_is_told_in_one_line(
    content: str, message: str, option: str, model: Path, adapter: Path, pairs: Path, run: Run, tmp_path: Path
) -> None:  # fmt: skip
    (adapter / "adapter_config.json").write_text(content)
    status, errors = run(model, "--data", pairs, option, adapter, "--output", tmp_path / "out")
    last = errors.strip().splitlines()[-1]
    assert status == 2
    assert last.startswith(f"deft report: {option} '{adapter}'")
    assert message in last


def test_an_adapter_without_weights_or_with_a_base_that_is_no_name(
    model: Path, adapter: Path, pairs: Path, tmp_path: Path, run: Run
) -> None:
    config = adapter / "adapter_config.json"
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": 3}
    config.write_text(json.dumps(settings))
    arguments = (model, "--data", pairs, "--rows", 2, "--adapter", adapter)
    status, errors = run(*arguments, "--output", tmp_path / "out")
    assert status == 0, errors
    (adapter / "adapter_model.safetensors").unlink()
    status, errors = run(*arguments, "--output", tmp_path / "out")
    assert status == 2
    assert "has no weights: adapter_model.safetensors is not in the folder" in errors


def test_an_adapter_of_virtual_tokens_is_refused(
    model: Path, pairs: Path, tmp_path: Path, run: Run
) -> None:
    """Its logits are not at the rows' positions."""
    kind = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(tiny_model("llama"), kind).save_pretrained(tmp_path / "adapter")
    status, errors = run(
        model, "--data", pairs, "--after", tmp_path / "adapter", "--output", tmp_path / "out"
    )
    assert status == 2
    assert "is no LoRA adapter but of the kind PROMPT_TUNING" in errors


def test_an_adapter_of_another_model_is_told(
    model: Path, adapter: Path, pairs: Path, tmp_path: Path, run: Run
) -> None:
    config = adapter / "adapter_config.json"
    for base, is_told in (
        ("someone/else", True),
        (f"elsewhere/{model.name}", False),
        (None, False),
    ):
        settings = json.loads(config.read_text()) | {"base_model_name_or_path": base}
        config.write_text(json.dumps(settings))
        output = tmp_path / "out"
        status, errors = run(model, "--data", pairs, "--after", adapter, "--rows", 2, "--objectives", "deft", "--output", output)  # fmt: skip
        assert status == 0, errors
        page = (output / "report.html").read_text(encoding="utf-8")
        assert (f"was trained on {base}, as its adapter_config.json says" in page) == is_told
    config.write_text("{")
    status, errors = run(
        model, "--data", pairs, "--rows", 2, "--after", adapter, "--output", output
    )
    assert status == 2
    assert f"--after '{adapter}': its adapter_config.json cannot be read" in errors


@pytest.mark.parametrize("name", ["rows", "batch_size", "max_length"])
def test_counts_are_checked_from_python_too(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1; it must be at least"):
        Options(tmp_path, **{name: -1})


def test_a_run_of_trl_s_own_loss_has_no_course_to_draw(tmp_path: Path, run: Run) -> None:
    state = {"log_history": [{"step": 1, "loss": 2.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    status, errors = run("--run", tmp_path, "--output", tmp_path / "out")
    assert status == 2
    assert "has logged none of mean_focus, mean_target_probability" in errors


def test_a_missing_package_is_named_with_the_extra(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = ("jinja2", "matplotlib")
    monkeypatch.setattr(errors_of_commands, "find_spec", lambda name: name not in missing or None)
    status, errors = run("model", "--data", "data")
    assert status == 2
    assert errors == 'deft report: needs jinja2, matplotlib: pip install "deft_plugin[report]"\n'


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["report", "--help"])
    text = capsys.readouterr().out
    for option in ("--data", "--adapter", "--after", "--objectives", "--compare", "--four-bit"):
        assert option in text


def test_several_runs_to_one_option() -> None:
    given = ["model", "--compare", "a", "b", "--rows", "3", "--compare", "c", "--seed", "1"]
    assert several_to_an_option(given) == [
        "model", "--compare", "a", "--compare", "b", "--rows", "3", "--compare", "c", "--seed", "1",
    ]  # fmt: skip
    assert several_to_an_option(["--compare=a", "b"]) == ["--compare=a", "--compare", "b"]


def test_the_page_s_files_are_installed_with_the_package() -> None:
    folder = importlib.resources.files("deft_plugin.report") / "template"
    names = {file.name for file in folder.iterdir()}
    assert names == {"page.html.jinja", "page.css", "page.js"}
    if sys.version_info >= (3, 11):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        patterns = project["tool"]["setuptools"]["package-data"]["deft_plugin"]
        for name in names:
            path = f"report/template/{name}"
            assert any(fnmatch.fnmatch(path, pattern) for pattern in patterns)
