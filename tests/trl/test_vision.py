"""Vision-language models under TRL: its collator, columns of images, prompts, adapters, evaluation."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import local_hub
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, EvalPrediction

from deft_plugin import gated_head_of
from deft_plugin.checks import check_batch
from deft_plugin.trl.config import HAS_FUSED_HEAD
from tests.formula_metrics import formula_metrics
from tests.ops.formulas import formula_losses
from tests.trl.running import LEARNING_RATE, config, make_trainer
from tests.trl.test_log import metrics_of
from tests.updates import assert_same_update, gradient_update, logged, trainable, update_of

# Those whose processors do without torchvision.
NAMES = ["LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration"]
QUESTIONS = ["What is better than ugly?", "What counts?", "Which way?", "How often is never?"]
ANSWERS = ["Beautiful", "Readability counts, and that a lot", "One obvious way to do it", "Often"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folder of each model and its processor."""
    folders = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in NAMES:
            folders[name] = str(tmp_path_factory.mktemp(name))
            local_hub.make_vision_model(f"tiny-{name}", Path(folders[name]))
    return folders


def pictures(count: int = 4, kind: str = "prompt-completion") -> Dataset:
    """Rows with one picture each; `kind` "messages" is all text in one column."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        prompt = [{"role": "user", "content": QUESTIONS[index % 4]}]
        completion = [{"role": "assistant", "content": ANSWERS[index % 4]}]
        columns = (
            {"messages": prompt + completion}
            if kind == "messages"
            else {"prompt": prompt, "completion": completion}
        )
        shape = (*generator.integers(32, 64, size=2), 3)
        rows.append({**columns, "image": generator.integers(0, 256, shape, dtype=np.uint8)})
    return Dataset.from_list(rows, features=local_hub.features_of(rows, several=False))


def vision_config(tmp_path: Path, **options: Any) -> Any:
    # Cutting rows would cut their images' tokens.
    return config(tmp_path / "out", **{"max_length": None, **options})


def label_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (n, V) of the labelled positions, and targets (n,)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    scored = batch["labels"][:, 1:] != -100
    logits = model(**inputs).logits[:, :-1][scored]
    return logits, batch["labels"][:, 1:][scored]


def batch_of(trainer: Any, rows: Dataset) -> dict[str, Tensor]:
    return dict(trainer.data_collator([rows[index] for index in range(len(rows))]))


def own_model(trainer: Any) -> Any:
    """A copy without the gated head."""
    model = copy.deepcopy(trainer.model)
    gated_head_of(model).remove()
    return model


def assert_step_is_that_of_the_formula(trainer: Any, rows: Dataset) -> None:
    model = own_model(trainer)
    loss = formula_losses(*label_logits(model, batch_of(trainer, rows)), "deft").mean()
    update = update_of(trainer.model, trainer.train)
    # Some of LLaVA's vision tower is not used.
    names = [name for name, value in trainable(model).items() if update[name].any()]
    for name, value in trainable(model).items():
        value.requires_grad_(name in names)
    assert any("vision" in name for name in names) or hasattr(trainer.model, "peft_config")
    expected = gradient_update(model, loss, LEARNING_RATE)
    assert_same_update({name: update[name] for name in names}, expected, tolerance=1e-3)
    assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-5)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["messages", "prompt-completion"])
def test_step_with_images_is_that_of_the_formula(
    tmp_path: Path, saved: dict[str, str], name: str, kind: str
) -> None:
    rows = pictures(kind=kind)
    trainer = make_trainer(vision_config(tmp_path), rows, saved[name], processing_class=None)
    assert "pixel_values" in batch_of(trainer, rows)
    assert_step_is_that_of_the_formula(trainer, rows)


@pytest.mark.parametrize("whole", [False, True])
def test_completions_alone_or_the_whole_row(
    tmp_path: Path, saved: dict[str, str], whole: bool
) -> None:
    rows = pictures()
    args = vision_config(tmp_path, completion_only_loss=not whole)
    trainer = make_trainer(args, rows, saved[NAMES[0]], processing_class=None)
    labels = batch_of(trainer, rows)["labels"]
    assert (labels[:, 0] == -100).all() != whole
    assert_step_is_that_of_the_formula(trainer, rows)


def test_lora_on_the_language_part(tmp_path: Path, saved: dict[str, str]) -> None:
    rows = pictures()
    lora = LoraConfig(
        r=4,
        target_modules=r".*language_model.*(q_proj|up_proj)|lm_head",
        init_lora_weights=False,
    )
    args = vision_config(tmp_path, gradient_checkpointing=True)
    trainer = make_trainer(args, rows, saved[NAMES[1]], processing_class=None, peft_config=lora)
    names = trainable(trainer.model)
    assert any("lm_head" in name for name in names)
    assert all("lora" in name for name in names)
    trainer.model.gradient_checkpointing_disable()
    assert_step_is_that_of_the_formula(trainer, rows)


def test_model_object_with_its_processor_on_text_alone(
    tmp_path: Path, saved: dict[str, str]
) -> None:
    folder = saved[NAMES[1]]
    model = AutoModelForImageTextToText.from_pretrained(folder)
    rows = Dataset.from_list(
        [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    )
    processor = AutoProcessor.from_pretrained(folder)
    trainer = make_trainer(config(tmp_path), rows, model, processing_class=processor)
    loss = formula_losses(
        *label_logits(own_model(trainer), batch_of(trainer, trainer.train_dataset)), "deft"
    ).mean()
    trainer.train()
    assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-5)]


def test_evaluation_with_images_and_compute_metrics(tmp_path: Path, saved: dict[str, str]) -> None:
    rows = pictures(3)
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"own": 1.5}

    trainer = make_trainer(
        vision_config(tmp_path),
        pictures(),
        saved[NAMES[0]],
        processing_class=None,
        eval_dataset=rows,
        compute_metrics=compute_metrics,
    )
    returned = trainer.evaluate()
    with torch.no_grad():
        logits, targets = label_logits(own_model(trainer).eval(), batch_of(trainer, rows))
    expected = formula_metrics(logits, targets, "deft")
    assert metrics_of(returned, "eval_") == pytest.approx(expected, rel=1e-4)
    assert returned["eval_own"] == 1.5
    scored = seen[0].label_ids[:, 1:] != -100
    np.testing.assert_allclose(seen[0].predictions[:, :-1][scored], logits.numpy(), atol=1e-4)


def test_tokenizer_with_more_tokens_than_the_model_shows_in_the_first_batch(
    tmp_path: Path, saved: dict[str, str]
) -> None:
    processor = AutoProcessor.from_pretrained(saved[NAMES[0]])
    room = local_hub.VOCAB_SIZE - len(processor.tokenizer)
    processor.tokenizer.add_tokens([f"[new{index}]" for index in range(room + 1)])
    rows = pictures().map(
        lambda row: {"completion": [{"role": "assistant", "content": f"[new{room}]"}]}
    )
    trainer = make_trainer(
        vision_config(tmp_path), rows, saved[NAMES[0]], processing_class=processor
    )
    message = (
        r"train_dataset: the first batch has 4 input_ids outside the model's vocabulary \[0, 1,024\), the first: "
        r"1,024\. .*resize_token_embeddings"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_label_on_an_image_that_the_model_has_no_logit_for(saved: dict[str, str]) -> None:
    """As with Llama 3.2's, whose token for images comes after the vocabulary."""
    model = AutoModelForImageTextToText.from_pretrained(saved[NAMES[0]])
    model.config.image_token_id = local_hub.VOCAB_SIZE
    ids = torch.tensor([[1, local_hub.VOCAB_SIZE, 2, 3]])
    check_batch("train_dataset", {"input_ids": ids, "labels": ids.clamp(max=3)}, model)
    with pytest.raises(ValueError, match=r"1 labels outside .* the first: 1,024\. .* to be -100"):
        check_batch("train_dataset", {"input_ids": ids, "labels": ids}, model)


def test_padding_token_of_the_processor_outside_the_vocabulary(
    tmp_path: Path, saved: dict[str, str]
) -> None:
    processor = AutoProcessor.from_pretrained(saved[NAMES[0]])
    room = local_hub.VOCAB_SIZE - len(processor.tokenizer)
    processor.tokenizer.add_tokens([f"[new{index}]" for index in range(room + 1)])
    processor.tokenizer.pad_token = f"[new{room}]"
    with pytest.raises(ValueError, match=r"pads with token 1,024, outside"):
        make_trainer(
            vision_config(tmp_path), pictures(), saved[NAMES[0]], processing_class=processor
        )


def changed(row: int, **columns: Any) -> Dataset:
    """Rows of messages, of which one has these columns."""
    return pictures(kind="messages").map(
        lambda _, number: columns if number == row else {}, with_indices=True
    )


@pytest.mark.parametrize("loss_type", ["deft", "nll"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (pictures().remove_columns("completion"), "has a column prompt and none named completion, only prompt, image"),
        (pictures().select_columns("image"), "has the columns image. With images, needed are messages, or prompt and completion"),
        (pictures(kind="messages").rename_column("messages", "conversations"), "has the columns .* With images, needed are messages"),
        (changed(2, image=None), "1 of 4 rows have no image, the first being row 2"),
        (changed(2, messages=None), "1 of 4 rows have no messages, the first being row 2"),
        (Dataset.from_list([{"text": "So? No", "images": []}] * 4), "has images beside text, .* Set remove_unused_columns=False"),
        (
            Dataset.from_list([{"prompt": "So?", "completion": " No", "images": each} for each in ([], None, [])]),
            "1 of 3 rows have no images, the first being row 1",
        ),
    ],
)  # fmt: skip
def test_rows_with_images_that_trls_collator_does_not_take(
    tmp_path: Path, saved: dict[str, str], rows: Dataset, message: str, loss_type: str
) -> None:
    args = vision_config(tmp_path, loss_type=loss_type)
    with pytest.raises(ValueError, match=f"^train_dataset:? {message}"):
        make_trainer(args, rows, saved[NAMES[0]], processing_class=None)


MESSAGES = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "No"}]


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        # Rows of text alone, as TRL's documentation mixes them with others.
        ({"messages": MESSAGES}, {}),
        pytest.param(
            {"messages": MESSAGES, "images": None},
            {},
            marks=pytest.mark.skipif(
                not HAS_FUSED_HEAD, reason="TRL 1.9's collator takes no nulls"
            ),
        ),
        # Its collator prefers messages.
        ({"prompt": "So?", "messages": MESSAGES}, {}),
        ({"text": "So? No"}, {"remove_unused_columns": False}),
    ],
    ids=str,
)
def test_rows_without_images_that_trls_collator_takes(
    tmp_path: Path, saved: dict[str, str], columns: dict[str, Any], options: dict[str, Any]
) -> None:
    rows = Dataset.from_list([{"images": [], **columns}] * 4)
    args = vision_config(tmp_path, **options)
    trainer = make_trainer(args, rows, saved[NAMES[0]], processing_class=None)
    trainer.train()
    assert logged(trainer, "scored_tokens")[0] > 0


def test_a_collator_of_ones_own_reads_columns_of_any_name(
    tmp_path: Path, saved: dict[str, str]
) -> None:
    args = vision_config(tmp_path, remove_unused_columns=False)
    trls = make_trainer(args, pictures(), saved[NAMES[0]], processing_class=None).data_collator

    def collator(examples: list[dict[str, Any]]) -> Any:
        return trls([{**each, "prompt": each.pop("question")} for each in examples])

    rows = pictures().rename_column("prompt", "question")
    trainer = make_trainer(
        args, rows, saved[NAMES[0]], processing_class=None, data_collator=collator
    )
    trainer.train()
    assert logged(trainer, "scored_tokens")[0] > 0


def test_first_batch_without_a_label_is_told(
    tmp_path: Path, saved: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "deft_plugin")
    # As long as the longest prompt.
    trainer = make_trainer(
        vision_config(tmp_path), pictures(), saved[NAMES[0]], processing_class=None
    )
    batch = batch_of(trainer, pictures())
    first = (batch["labels"] != -100).int().argmax(-1).min().item()
    shortest = pictures().select([int((batch["labels"] != -100).int().argmax(-1).argmin())])
    args = vision_config(tmp_path, max_length=first)
    trainer = make_trainer(args, shortest, saved[NAMES[0]], processing_class=None)
    trainer.train()
    told = [record.getMessage() for record in caplog.records if record.name == "deft_plugin"]
    assert told[0].startswith("train_dataset: the first batch has no token to train on.")
