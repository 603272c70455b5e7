"""TRL's data formats and ways of batching: the tokens it labels are scored, each in its own context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from tests.tiny import tiny_tokenizer
from tests.trl.running import LEARNING_RATE, as_dataset, config, make_trainer
from tests.updates import (
    Rows,
    assert_same_update,
    formula_mean,
    gradient_update,
    logged,
    make_rows,
    qwen3,
    update_of,
)

PAIRS = [("1 + 1 =", " 2"), ("12 * 3 =", " 36, of course"), ("So?", " No"), ("Why?", " 42 is why")]


def messages(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


# The data set, the configuration, and the text that is trained on for a prompt and its completion.
FORMATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], Any]] = {
    "text": (
        [{"text": prompt + completion} for prompt, completion in PAIRS],
        {},
        lambda prompt, completion: (prompt + completion)[1:] + "<|im_end|>",
    ),
    "prompt-completion": (
        [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS],
        {},
        lambda prompt, completion: completion + "<|im_end|>",
    ),
    "prompt-completion, all of it": (
        [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS],
        {"completion_only_loss": False},
        lambda prompt, completion: (prompt + completion)[1:] + "<|im_end|>",
    ),
    "conversation": (
        [{"messages": messages(*pair)} for pair in PAIRS],
        {},
        lambda prompt, completion: (
            turn("user", prompt) + turn("assistant", completion).removesuffix("\n")
        ).removeprefix("<|im_start|>"),
    ),
    "assistant only": (
        [{"messages": messages(*pair)} for pair in PAIRS],
        {"assistant_only_loss": True},
        lambda prompt, completion: completion + "<|im_end|>",
    ),
}


def assert_step_is_that_of_the_formula(trainer: Any, rows: Rows) -> None:
    model = qwen3()
    loss = formula_mean(model, rows, "deft")
    update = update_of(trainer.model, trainer.train)
    assert_same_update(update, gradient_update(model, loss, LEARNING_RATE), tolerance=1e-9)
    assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-6)]


@pytest.mark.parametrize("name", FORMATS)
def test_format_trains_on_the_tokens_that_it_means(tmp_path: Path, name: str) -> None:
    examples, options, trained_text = FORMATS[name]
    trainer = make_trainer(config(tmp_path, **options), Dataset.from_list(examples))
    rows = list(trainer.train_dataset)
    scored = [
        tiny_tokenizer().decode([label for label in row["labels"][1:] if label != -100])
        for row in rows
    ]
    assert scored == [trained_text(*pair) for pair in PAIRS]
    assert_step_is_that_of_the_formula(trainer, rows)


def test_formatting_function(tmp_path: Path) -> None:
    examples = Dataset.from_list([{"question": p, "answer": c} for p, c in PAIRS])
    trainer = make_trainer(
        config(tmp_path), examples, formatting_func=lambda row: row["question"] + row["answer"]
    )
    assert_step_is_that_of_the_formula(trainer, list(trainer.train_dataset))


def test_stream(tmp_path: Path) -> None:
    rows = make_rows(4)
    stream = as_dataset(rows).to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    trainer = make_trainer(config(tmp_path), stream)
    assert_step_is_that_of_the_formula(trainer, rows)


@pytest.mark.parametrize(
    "options",
    [
        {"padding_free": True, "max_length": None},
        {"packing": True, "packing_strategy": "bfd", "max_length": 64},
        {"packing": True, "packing_strategy": "bfd", "max_length": 24},
    ],
    ids=str,
)
def test_documents_in_one_row_train_as_they_do_in_rows_of_their_own(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    rows = make_rows(4)
    trainer = make_trainer(config(tmp_path, **options), rows)
    if options.get("packing"):
        assert len(trainer.train_dataset) < len(rows)
    assert_step_is_that_of_the_formula(trainer, rows)


def test_wrapped_packing_trains_on_the_rows_that_trl_has_wrapped(tmp_path: Path) -> None:
    args = config(tmp_path, packing=True, packing_strategy="wrapped", max_length=24)
    trainer = make_trainer(args, make_rows(4))
    assert_step_is_that_of_the_formula(trainer, list(trainer.train_dataset))


def test_packed_evaluation_has_the_metrics_of_unpacked_rows(tmp_path: Path) -> None:
    rows, eval_dataset = make_rows(2), as_dataset(make_rows(6, seed=1))
    nll = [
        make_trainer(
            config(tmp_path, packing=packing, eval_packing=packing, max_length=40),
            rows,
            eval_dataset=eval_dataset,
        ).evaluate()["eval_nll"]
        for packing in (False, True)
    ]
    assert nll[1] == pytest.approx(nll[0], rel=1e-9)
