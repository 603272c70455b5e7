"""The data of the demo: procedural tasks from reasoning_gym as prompt/completion pairs, and their scoring.

The base model (`make_base_model.py`) is trained on a mixture of tasks, `PRETRAINING_TASKS`. It is then
fine-tuned on one it has never seen, from `FINE_TUNING_TASKS`:

    splits = make_splits(FINE_TUNING_TASKS["spell_backward"], train=4000, held_out=256, seed=0)
    splits["train"][0]["prompt"]      # [{"role": "user", "content": "Spell this word backward ..."}]
    splits["train"][0]["completion"]  # [{"role": "assistant", "content": "sselkrelc"}]
    result = evaluate(model, tokenizer, splits["held_out"])
    print(result.accuracy, result.nll)

Everything follows from the seed, and no question of the held-out split occurs in the training split.
The words and sentences in the questions are English: a list of 150 000 words and a short novel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from torch.nn import functional
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that no loss is computed for


@dataclass(frozen=True)
class Task:
    """A task of reasoning_gym.

    Attributes:
        name: its name in reasoning_gym.
        settings: what to set in reasoning_gym's configuration of the task.
        line: the line of a question that states the case at hand, by index. The other lines explain the
            task in words that are the same in each question; at a token per character they would be most
            of the compute. None keeps the whole question.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    line: int | None = None


def _by_name(*tasks: Task) -> dict[str, Task]:
    return {task.name: task for task in tasks}


PRETRAINING_TASKS = _by_name(
    Task("palindrome_generation", line=-1),
    Task("word_sequence_reversal", {"max_words": 6}, line=-1),
    Task("word_sorting", {"max_words": 5, "max_word_length": 8}, line=-1),
    Task("string_insertion", {"max_string_length": 12}, line=-1),
    Task("number_sorting", {"max_numbers": 5, "max_decimals": 1}, line=0),
    Task("letter_counting", {"max_words": 8}),
    Task("chain_sum", {"max_terms": 3, "max_digits": 2}),
)
FINE_TUNING_TASKS = _by_name(
    Task("spell_backward"),
    Task("number_filtering", {"max_numbers": 5, "max_decimals": 1}),
)


@dataclass(frozen=True)
class Evaluation:
    """How well a model does on a split.

    Attributes:
        accuracy: share of the questions whose greedy answer gets full marks, in [0, 1].
        nll: mean negative log-likelihood of the reference answers' tokens, end of turn included, in nats.
        answers: the model's answers, in the split's order.
    """

    accuracy: float
    nll: float
    answers: list[str]


def make_splits(task: Task, train: int, held_out: int, seed: int) -> DatasetDict:
    """Two disjoint splits of a task, `train` and `held_out`, of the sizes asked for.

    Each row has `prompt` and `completion` (lists of messages, as TRL takes them), `task` (the name) and
    `entry` (reasoning_gym's record of the question as JSON, which its scorer needs).
    """
    rows = _distinct_rows(task, seed)
    # The held-out rows come first, so that they stay the same when the size of `train` changes.
    test_rows = [next(rows) for _ in range(held_out)]
    train_rows = [next(rows) for _ in range(train)]
    return DatasetDict(train=Dataset.from_list(train_rows), held_out=Dataset.from_list(test_rows))


def make_mixture(
    tasks: Mapping[str, Task], train: int, held_out: int, seed: int
) -> tuple[Dataset, dict[str, Dataset]]:
    """The tasks' training splits shuffled together, and each task's held-out split by name.

    Args:
        tasks: the tasks, by name.
        train: number of training rows for each task.
        held_out: number of held-out rows for each task.
        seed: seeds the questions and the order of the training rows.
    """
    splits = {name: make_splits(task, train, held_out, seed) for name, task in tasks.items()}
    mixture = concatenate_datasets([split["train"] for split in splits.values()])
    return mixture.shuffle(seed), {name: split["held_out"] for name, split in splits.items()}


def _distinct_rows(task: Task, seed: int) -> Iterator[dict[str, Any]]:
    """An endless stream of rows in which no question comes twice, not even in another letter case."""
    try:
        import reasoning_gym  # here, because its import takes seconds which other data need not wait
    except ModuleNotFoundError:
        raise ValueError(
            f"The task {task.name!r} needs reasoning_gym (Python >= 3.11): pip install reasoning-gym"
        ) from None
    # reasoning_gym makes each question from (seed + index), so neighbouring seeds give nearly the same
    # questions; seeds are set far apart here.
    dataset = reasoning_gym.create_dataset(
        task.name, seed=seed * 10**9, size=10**9, **task.settings
    )
    seen = set()
    for index in range(len(dataset)):
        entry = dataset[index]
        question = entry["question"].strip()
        if task.line is not None:
            question = question.splitlines()[task.line]
        if question.casefold() in seen:
            continue
        seen.add(question.casefold())
        yield {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": entry["answer"]}],
            "task": task.name,
            "entry": json.dumps(entry),
        }


def is_correct(row: Mapping[str, Any], answer: str) -> bool:
    """Whether reasoning_gym's scorer gives the answer full marks.

    A question with several right answers, such as a palindrome from given letters, accepts each of them.
    """
    import reasoning_gym

    score = reasoning_gym.get_score_answer_fn(row["task"])
    return score(answer, json.loads(row["entry"])) == 1.0


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    batch_size: int = 64,
    max_new_tokens: int = 64,
) -> Evaluation:
    """Accuracy of the greedy answers and nll of the reference answers, in batches of `batch_size`."""
    was_training = model.training
    model.eval()
    answers: list[str] = []
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in rows.iter(batch_size):
            answers += greedy_answers(model, tokenizer, batch["prompt"], max_new_tokens)
            batch_total, batch_count = _answer_nll(model, tokenizer, batch)
            total, count = total + batch_total, count + batch_count
    model.train(was_training)
    correct = sum(is_correct(row, answer) for row, answer in zip(rows, answers, strict=True))
    return Evaluation(correct / len(rows), total / count, answers)


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[dict[str, str]]],
    max_new_tokens: int = 64,
) -> list[str]:
    """What the model says to each prompt, all of them texts or all of them lists of messages."""
    texts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    inputs = tokenizer(
        texts,
        # A chat template writes the special tokens itself.
        add_special_tokens=isinstance(prompts[0], str),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new_tokens, skip_special_tokens=True)


def labelled_answers(
    tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, list[Any]]
) -> BatchEncoding:
    """The rows' conversations, padded: input_ids, attention_mask and labels, those of the answers alone."""
    inputs = tokenizer.apply_chat_template(
        [p + c for p, c in zip(batch["prompt"], batch["completion"], strict=True)],
        padding=True,
        return_tensors="pt",
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    is_answer = torch.as_tensor(inputs.pop("assistant_masks")).bool()
    inputs["labels"] = inputs["input_ids"].masked_fill(~is_answer, IGNORED)
    return inputs


def _answer_nll(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, list[Any]]
) -> tuple[float, int]:
    """Summed nll of the reference answers' tokens in nats, and the number of those tokens."""
    inputs = labelled_answers(tokenizer, batch).to(model.device)
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs).logits[:, :-1].float()
    total = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total.item(), int((labels != IGNORED).sum())
