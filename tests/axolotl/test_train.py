"""`axolotl train` on the local YAML: QLoRA on the shipped base model, merged, and generating."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from .running import environment

ROOT = Path(__file__).parents[2]
CONFIG = "axolotl_configs/local.yaml"
STEPS = 16


def axolotl(command: str, output: Path, *options: str) -> str:
    """Run a command of Axolotl's as a user does; its output."""
    paths = ["--output-dir", str(output), "--dataset-prepared-path", str(output / "prepared")]
    result = subprocess.run(
        [str(Path(sys.executable).parent / "axolotl"), command, CONFIG, *paths, *options],
        cwd=ROOT,
        # Axolotl starts accelerate by its name.
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def answer(model: Path, question: str) -> str:
    """The model's greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = AutoModelForCausalLM.from_pretrained(model).generate(
        **inputs, max_new_tokens=24, do_sample=False
    )
    text: str = tokenizer.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text


@pytest.mark.slow
def test_it_trains_saves_merges_and_generates(tmp_path: Path) -> None:
    output = axolotl("train", tmp_path, "--max-steps", str(STEPS))
    assert "deft_plugin: objective DEFT(); gated head on Qwen3ForCausalLM (frozen lm_head" in output
    state = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_nll" in entry]
    # By nll: DEFT's own loss may rise while the model learns, since its gates open.
    assert evaluations[-1]["eval_nll"] < 0.75 * evaluations[0]["eval_nll"]
    assert (tmp_path / "adapter_model.safetensors").is_file()

    axolotl("merge-lora", tmp_path)
    question = "Spell this word backward (example: sun -> nus): table"
    trained = answer(tmp_path / "merged", question)
    # Too few steps to spell backward, enough to answer with one word's letters and stop.
    assert trained.isalpha()
    assert trained != answer(ROOT / "assets/base_model", question)
