"""The demo's tasks: their splits, their scorer, and the evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("reasoning_gym", reason="needs the extra `scripts`")
import tasks

ALL_TASKS = {**tasks.PRETRAINING_TASKS, **tasks.FINE_TUNING_TASKS}


def questions(rows: Dataset) -> list[str]:
    return [prompt[0]["content"] for prompt in rows["prompt"]]


def answer(row: dict[str, Any]) -> str:
    return row["completion"][0]["content"]


def test_no_task_is_both_for_pretraining_and_for_fine_tuning() -> None:
    assert not tasks.PRETRAINING_TASKS.keys() & tasks.FINE_TUNING_TASKS.keys()


@pytest.mark.parametrize("task", ALL_TASKS.values(), ids=list(ALL_TASKS))
def test_splits_have_the_sizes_asked_for_and_share_no_question(task: tasks.Task) -> None:
    splits = tasks.make_splits(task, train=150, held_out=50, seed=3)
    train, held_out = questions(splits["train"]), questions(splits["held_out"])
    assert (len(train), len(held_out)) == (150, 50)
    assert len({question.casefold() for question in train + held_out}) == 200


@pytest.mark.parametrize("task", ALL_TASKS.values(), ids=list(ALL_TASKS))
def test_the_seed_alone_decides_the_questions(task: tasks.Task) -> None:
    def held_out(seed: int, train: int) -> list[str]:
        return questions(tasks.make_splits(task, train, held_out=30, seed=seed)["held_out"])

    assert held_out(seed=5, train=2) == held_out(seed=5, train=40)
    assert len(set(held_out(seed=5, train=2)) & set(held_out(seed=6, train=2))) < 10


@pytest.mark.parametrize("task", ALL_TASKS.values(), ids=list(ALL_TASKS))
def test_the_scorer_takes_the_reference_answer_and_no_other(task: tasks.Task) -> None:
    rows = list(tasks.make_splits(task, train=1, held_out=30, seed=0)["held_out"])
    assert all(tasks.is_correct(row, answer(row)) for row in rows)
    assert not any(tasks.is_correct(row, "") for row in rows)
    others = [(row, other) for row in rows for other in rows if answer(row) != answer(other)]
    assert not any(tasks.is_correct(row, answer(other)) for row, other in others[:100])


def test_the_mixture_has_every_task_in_equal_numbers() -> None:
    mixture, held_out = tasks.make_mixture(tasks.PRETRAINING_TASKS, train=5, held_out=2, seed=0)
    counts = {name: mixture["task"].count(name) for name in tasks.PRETRAINING_TASKS}
    assert counts == dict.fromkeys(tasks.PRETRAINING_TASKS, 5)
    assert {name: len(rows) for name, rows in held_out.items()} == dict.fromkeys(counts, 2)


def test_the_evaluation_does_not_depend_on_the_batch_size() -> None:
    model, tokenizer = tiny_model("qwen3"), tiny_tokenizer()
    rows = tasks.make_splits(ALL_TASKS["spell_backward"], train=1, held_out=7, seed=0)["held_out"]
    one, many = (tasks.evaluate(model, tokenizer, rows, size, max_new_tokens=8) for size in (1, 4))
    assert one.answers == many.answers
    assert one.nll == pytest.approx(many.nll, rel=1e-5)
    assert model.training


def test_nll_is_that_of_the_answer_with_its_end_of_turn() -> None:
    model, tokenizer = tiny_model("llama").eval(), tiny_tokenizer()
    rows = tasks.make_splits(ALL_TASKS["spell_backward"], train=1, held_out=1, seed=0)["held_out"]
    prompt = tokenizer.apply_chat_template(
        rows[0]["prompt"], add_generation_prompt=True, tokenize=False
    )
    prompt_ids, answer_ids = (
        tokenizer(text, return_tensors="pt")["input_ids"]
        for text in (prompt, answer(rows[0]) + tokenizer.eos_token)
    )
    with torch.no_grad():
        logits = model(torch.cat([prompt_ids, answer_ids], 1)).logits[
            0, prompt_ids.size(1) - 1 : -1
        ]
    expected = torch.nn.functional.cross_entropy(logits, answer_ids[0]).item()
    assert tasks.evaluate(model, tokenizer, rows, max_new_tokens=1).nll == pytest.approx(
        expected, rel=1e-5
    )
