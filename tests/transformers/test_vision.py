"""Vision-language models under transformers' trainer."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import local_hub
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, EvalPrediction

from tests.formula_metrics import formula_metrics
from tests.transformers.running import arguments, make_trainer
from tests.transformers.test_evaluation import metrics_of
from tests.updates import make_rows

NAME = "tiny-LlavaForConditionalGeneration"
TEXTS = ["What counts? <image> Readability", "<image> Now is better than never"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        local_hub.make_vision_model(NAME, folder)
    return folder


def test_a_checkpoint_whose_weights_have_other_names_is_told(
    tmp_path: Path, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers writes the names of its hub, and resumes by those in memory; what it does not find stays as it was."""
    caplog.set_level(logging.WARNING, "deft_plugin")
    steps = dict.fromkeys(("save_strategy", "eval_strategy"), "steps")
    args = arguments(
        tmp_path,
        **steps,
        max_steps=2,
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_nll",
    )

    def trainer_of(model: Any) -> Any:
        return make_trainer(args, make_rows(8), model, eval_dataset=make_rows(4))

    trainer_of(AutoModelForImageTextToText.from_pretrained(saved)).train()
    message = r"The checkpoint lacks \d+ of the weights that train \(.*, \.\.\.\): "
    assert re.search(f"{message}.* those of the last step, not the best ones", caplog.text)
    caplog.clear()
    trainer_of(AutoModelForImageTextToText.from_pretrained(saved)).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
    assert re.search(f"{message}.* They stay as the model was given", caplog.text)


def test_predictions_beside_images_are_gathered(tmp_path: Path, saved: Path) -> None:
    """The model's output has these too, with fields that are None, which accelerate cannot gather."""
    processor = AutoProcessor.from_pretrained(saved)
    model = AutoModelForImageTextToText.from_pretrained(saved).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)

    def collate(indices: list[int]) -> dict[str, Any]:
        batch = processor(
            images=[pixels[index] for index in indices],
            text=[TEXTS[index] for index in indices],
            padding=True,
            return_tensors="pt",
        )
        ignored = batch["attention_mask"] == 0
        ignored |= batch["input_ids"] == model.config.image_token_id
        return {**batch, "labels": batch["input_ids"].masked_fill(ignored, -100)}

    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {}

    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = make_trainer(
        args,
        [0, 1],
        AutoModelForImageTextToText.from_pretrained(saved),
        data_collator=collate,
        eval_dataset=[0, 1],
        compute_metrics=compute_metrics,
    )
    returned = trainer.evaluate()
    inputs = collate([0, 1])
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs).logits
    (prediction,) = seen
    predicted = prediction.predictions
    # transformers 5.16 has the features as a tensor, which can be gathered.
    predicted = predicted[0] if isinstance(predicted, tuple) else predicted
    torch.testing.assert_close(torch.from_numpy(predicted), logits, rtol=0, atol=1e-5)
    scored = labels[:, 1:] != -100
    expected = formula_metrics(logits[:, :-1][scored], labels[:, 1:][scored], "deft")
    assert metrics_of(returned, "eval_") == pytest.approx(expected, rel=1e-4)
