"""The wheel in an environment of its own, outside any checkout, does what it is for."""

from __future__ import annotations

import json
from pathlib import Path

import deft_plugin
from tests.tiny import tiny_model, tiny_tokenizer

from .conftest import Run, outside, pip_of

# Those of the TRL line, as the Makefile installs it, and those that they ask for.
EXTRAS = ["deepspeed", "dev", "paper", "qlora", "quack", "report", "scripts", "trl", "vision"]


def test_it_is_the_wheels_package_that_is_imported(run: Run, environment: Path) -> None:
    file = run("python", "-c", "import deft_plugin; print(deft_plugin.__file__)")
    assert Path(file.strip()).is_relative_to(environment)


def test_doctor_finds_nothing_wrong(run: Run) -> None:
    # With status 0, which `run` sees to.
    assert f"deft_plugin {deft_plugin.__version__}" in run("deft", "doctor")


def test_objectives_are_listed(run: Run) -> None:
    listed = run("deft", "objectives")
    assert [name for name in deft_plugin.objective_names() if name not in listed] == []


def test_two_steps_of_training(run: Run, tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(8)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(
        *("deft", "sft", "--loss_type", "deft", "--model_name_or_path", "model"),
        *("--dataset_name", "data", "--use_peft", "--lora_target_modules", "all-linear"),
        *("--max_steps", "2", "--logging_steps", "1", "--learning_rate", "0.01"),
        *("--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--output_dir", "out"),
        *("--save_strategy", "steps", "--save_steps", "2"),
    )
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "mean_gate" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    assert all(0 < entry["mean_gate"] < 1 for entry in steps)
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_the_extras_ask_for_what_the_trl_line_has(environment: Path, wheel: Path) -> None:
    """Those too that ask for one another, by the names that the wheel gives them."""
    asked = f"deft_plugin[{','.join(EXTRAS)}] @ {wheel.as_uri()}"
    options = ["--no-index", "--dry-run", "--quiet", "--report", "-"]
    report = outside(environment, *pip_of(environment), "install", *options, asked)
    missing = [each["metadata"]["name"] for each in json.loads(report)["install"]]
    assert set(missing) <= {"deft_plugin"}
