"""Multi-modal models with images in the batch: Axolotl's processors and collator, LoRA, evaluation, the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import local_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests.formula_metrics import formula_metrics
from tests.ops.formulas import formula_losses
from tests.updates import assert_same_update, gradient_update, trainable, update_of

from .running import CUT, LORA, PLUGIN, configuration, environment, make_trainer
from .test_log import metrics_of

ROOT = Path(__file__).parents[2]
# With the chat template by whose name Axolotl picks what it makes of a batch. Their processors do without torchvision.
TEMPLATES = {"Gemma3ForConditionalGeneration": "gemma3", "LlavaForConditionalGeneration": "llava"}
GEMMA, LLAVA = TEMPLATES
LEARNING_RATE = 0.1


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each model and its processor."""
    folders = {name: tmp_path_factory.mktemp(name) for name in TEMPLATES}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, folder in folders.items():
            local_hub.make_vision_model(f"tiny-{name}", folder)
    return folders


def messages(folder: Path, count: int = 4) -> list[dict[str, Any]]:
    """Rows with a picture of another size in each, and answers of unequal lengths."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        path = folder / f"{index}.png"
        pixels = generator.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        question = [{"type": "image", "path": str(path)}, {"type": "text", "text": "What counts?"}]
        answer = [{"type": "text", "text": " ".join(["Readability"] * (index + 1))}]
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"messages": turns})
    return rows


def vision(name: str, folder: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """Keys of a multi-modal run."""
    return configuration(
        folder,
        output,
        **{
            "processor_type": "AutoProcessor",
            "chat_template": TEMPLATES[name],
            "skip_prepare_dataset": True,
            "remove_unused_columns": False,
            "sample_packing": False,
            "learning_rate": LEARNING_RATE,
            **overrides,
        },
    )


def label_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (n, V) of the labelled positions, and targets (n,)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    assert "pixel_values" in inputs
    scored = batch["labels"][:, 1:] != -100
    return model(**inputs).logits[:, :-1][scored], batch["labels"][:, 1:][scored]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(("micro_batch_size", "accumulation"), [(4, 1), (1, 4)])
def test_a_step_with_images_is_that_of_the_formula(
    tmp_path: Path, saved: dict[str, Path], name: str, micro_batch_size: int, accumulation: int
) -> None:
    rows = messages(tmp_path)
    keys = {"micro_batch_size": micro_batch_size, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(vision(name, saved[name], tmp_path, **keys), rows)
    batch = trainer.data_collator(messages(tmp_path))
    update = update_of(trainer.model, trainer.train)

    model = AutoModelForImageTextToText.from_pretrained(saved[name])
    loss = formula_losses(*label_logits(model, batch), "deft").mean()
    # Some of LLaVA's vision tower is not used.
    used = [key for key in trainable(model) if update[key].any()]
    for key, value in trainable(model).items():
        value.requires_grad_(key in used)
    assert any("vision" in key for key in used)
    expected = gradient_update(model, loss, LEARNING_RATE)
    assert_same_update({key: update[key] for key in used}, expected, 1e-3)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_lora_on_the_language_part_and_lm_head(tmp_path: Path, saved: dict[str, Path]) -> None:
    lora = {**LORA, "lora_target_modules": r".*language_model.*q_proj|lm_head"}
    del lora["lora_target_linear"]
    keys = {"max_steps": 2, "num_epochs": 2, "peft_init_lora_weights": False, **lora}
    trainer = make_trainer(vision(LLAVA, saved[LLAVA], tmp_path, **keys), messages(tmp_path))
    assert any("lm_head" in key for key in trainable(trainer.model))
    batch = trainer.data_collator(messages(tmp_path))
    logits, targets = label_logits(trainer.model, batch)
    expected = formula_losses(logits, targets, "deft").mean().item()
    update = update_of(trainer.model, trainer.train)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert all(value.any() for value in update.values())


def test_evaluation_with_images(tmp_path: Path, saved: dict[str, Path]) -> None:
    data = [{"path": "rows.jsonl", "type": "chat_template", "split": "train"}]
    values = vision(GEMMA, saved[GEMMA], tmp_path, test_datasets=data, eval_batch_size=2)
    trainer = make_trainer(values, messages(tmp_path), messages(tmp_path, 3))
    returned = trainer.evaluate()
    model = AutoModelForImageTextToText.from_pretrained(saved[GEMMA]).eval()
    batch = trainer.data_collator(messages(tmp_path, 3))
    expected = formula_metrics(*label_logits(model, batch), "deft")
    assert metrics_of(returned, "eval_") == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_the_command_line_trains_on_images(tmp_path: Path, saved: dict[str, Path]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in messages(tmp_path)) + "\n")
    data = [{"path": str(rows), "type": "chat_template", "field_messages": "messages"}]
    values = vision(GEMMA, saved[GEMMA], tmp_path / "out", datasets=data, plugins=[PLUGIN, CUT])
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**values, "save_strategy": "steps", "save_steps": 1}))
    command = [str(Path(sys.executable).parent / "axolotl"), "train", str(file)]
    # Not by accelerate, which is another process to import all.
    command += ["--launcher", "python"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "deft_plugin: cut_cross_entropy set to false" in result.stdout
    assert "gated head on Gemma3ForConditionalGeneration" in result.stdout
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    trainer = make_trainer(values, messages(tmp_path))
    trainer.train()
    logged = [log["loss"] for log in (state["log_history"][0], trainer.state.log_history[0])]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)
