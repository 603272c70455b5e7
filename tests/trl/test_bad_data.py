"""Data sets and models that cannot teach: an error before training, or a warning with a count."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, LargeList, List, Value
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from deft_plugin.checks import check_weights, count_tokens
from tests.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.trl.running import as_dataset, config, make_trainer
from tests.updates import logged, make_rows, qwen3

PAIRS = [("1 + 1 =", " 2"), ("12 * 3 =", " 36, of course"), ("So?", " No"), ("Why?", " 42 is why")]


UNPREPARED = {"skip_prepare_dataset": True}


def pairs(*chosen: tuple[str, str]) -> Dataset:
    return Dataset.from_list([{"prompt": p, "completion": c} for p, c in chosen or PAIRS])


def refused(tmp_path: Path, dataset: Any, message: str, **options: Any) -> None:
    names = ("max_length", "packing", "dataset_kwargs")
    settings = {name: options.pop(name) for name in names if name in options}
    with pytest.raises(ValueError, match=message):
        make_trainer(config(tmp_path, **settings), dataset, **options)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    """A function that gives the warnings of deft_plugin so far."""
    caplog.set_level(logging.WARNING, "deft_plugin")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "deft_plugin"]


def test_no_rows(tmp_path: Path) -> None:
    nothing = pairs().select([])
    refused(tmp_path, nothing, "train_dataset has no rows")
    refused(tmp_path, pairs(), "eval_dataset has no rows", eval_dataset=nothing)
    several = {"good": pairs(), "bad": nothing}
    refused(tmp_path, pairs(), r"eval_dataset\['bad'\] has no rows", eval_dataset=several)


def test_no_label_in_any_row(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, -100, -100]} for _ in range(3)]
    refused(tmp_path, as_dataset(rows), "train_dataset: none of its 3 rows has a token to train on")


def test_answers_that_max_length_cuts_off_altogether(tmp_path: Path) -> None:
    refused(tmp_path, pairs(), "none of its 4 rows .* within max_length=3", max_length=3)


def test_rows_that_max_length_leaves_out_or_cuts_are_counted(tmp_path: Path, warnings: Any) -> None:
    lengths = [
        len(row["input_ids"]) for row in make_trainer(config(tmp_path), pairs()).train_dataset
    ]
    assert warnings() == []
    # One prompt alone fills it; two more rows are longer.
    trainer = make_trainer(config(tmp_path, max_length=8), pairs())
    assert len(trainer.train_dataset) == 3
    assert sum(length > 8 for length in lengths) == 3
    assert [w.split(":")[1].split("rows")[0].strip() for w in warnings()] == ["1 of 4", "2 of 3"]
    assert "left out, having no token to train on within max_length=8" in warnings()[0]
    assert "where an answer ends" in warnings()[1]


def test_rows_cut_at_their_beginning_have_their_end(tmp_path: Path, warnings: Any) -> None:
    make_trainer(config(tmp_path, max_length=3, truncation_mode="keep_end"), pairs())
    assert warnings() == []


def test_rows_that_never_had_a_label_are_left_out_without_blaming_their_length(
    tmp_path: Path, warnings: Any
) -> None:
    rows = make_rows(4)
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    make_trainer(config(tmp_path), rows)
    assert warnings() == [
        "train_dataset: 1 of 4 rows are left out, having no token to train on within max_length=1024."
    ]


def test_some_rows_without_labels_are_counted(tmp_path: Path, warnings: Any) -> None:
    rows = make_rows(4)
    first, *rest = rows[1]["input_ids"]
    rows[1]["labels"] = [first] + [-100] * len(rest)
    make_trainer(config(tmp_path), rows, eval_dataset=as_dataset(rows))
    assert warnings() == [
        "train_dataset: 1 of 4 rows have no token to train on.",
        "eval_dataset: 1 of 4 rows have no token to train on.",
    ]


@pytest.mark.parametrize("column", ["input_ids", "labels"])
@pytest.mark.parametrize("token", [VOCAB_SIZE, -5])
def test_token_outside_the_vocabulary(tmp_path: Path, column: str, token: int) -> None:
    rows = make_rows(4)
    rows[2][column] = [*rows[2][column][:-1], token]
    message = rf"train_dataset: 1 of 4 rows have {column} outside .* \[0, 128\), the first in row 2: {token}"
    refused(tmp_path, as_dataset(rows), message)
    refused(tmp_path, make_rows(4), message.replace("train", "eval"), eval_dataset=as_dataset(rows))


def test_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{index}>" for index in range(VOCAB_SIZE - len(tokenizer) + 2)])
    assert len(tokenizer) == VOCAB_SIZE + 2
    data = pairs(*PAIRS, (f"<new{len(tokenizer) - len(tiny_tokenizer()) - 1}>", " 1"))
    refused(
        tmp_path,
        data,
        r"1 of 5 rows have input_ids outside .*: 129\. .*resize_token_embeddings",
        processing_class=tokenizer,
    )
    # As the message says.
    model = qwen3()
    model.resize_token_embeddings(len(tokenizer))
    trainer = make_trainer(config(tmp_path), data, model, processing_class=tokenizer)
    trainer.train()
    assert trainer.model.lm_head.weight.size(0) == VOCAB_SIZE + 2
    assert logged(trainer, "nll")[0] > 0


def test_nan_weights(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5:7] = torch.nan
    refused(
        tmp_path, make_rows(4), r"model\.layers\.1\.mlp\.up_proj\.weight has 2 NaN of", model=model
    )


def test_modules_to_save_that_are_not_there(tmp_path: Path) -> None:
    adapter = {"target_modules": ["q_proj"], "modules_to_save": ["lm_haed", "embed_tokens"]}
    message = (
        r"modules_to_save=.*: the model has no lm_haed, which would be left out without a word\. It has down_proj, "
        "embed_tokens, .*lm_head, norm, "
    )
    for task in (None, "CAUSAL_LM"):
        lora = LoraConfig(**adapter, task_type=task)
        refused(tmp_path, make_rows(4), message, peft_config=lora)
        refused(tmp_path, make_rows(4), message, model=get_peft_model(qwen3(), lora))
    # An end of a name is enough for PEFT.
    for right in (["lm_head"], ["model.norm"], ["layers.1.input_layernorm"], []):
        lora = LoraConfig(target_modules=["q_proj"], modules_to_save=right, task_type="CAUSAL_LM")
        make_trainer(config(tmp_path), make_rows(4), peft_config=lora)


def test_nan_in_the_lm_head_and_in_prompt_tuning(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.lm_head.weight.data[3, 5] = torch.nan
    refused(tmp_path, make_rows(4), "lm_head has 1 NaN or infinite numbers", model=model)
    tuned = get_peft_model(
        tiny_model("qwen3"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with torch.no_grad():
        tuned.prompt_encoder.default.embedding.weight[0, 0] = torch.nan
    refused(tmp_path, make_rows(4), "prompt_encoder.*has 1 NaN", model=tuned)


def test_a_tokenizer_without_tokens(tmp_path: Path) -> None:
    """A model's folder without the tokenizer's files, of which transformers makes an empty one."""
    qwen3().save_pretrained(tmp_path / "model")
    message = r"none but special ones: the model's folder lacks the tokenizer's files"
    with pytest.raises(ValueError, match=message):
        make_trainer(config(tmp_path), pairs(), str(tmp_path / "model"), processing_class=None)


def test_padding_outside_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{index}>" for index in range(60)])
    tokenizer.pad_token = "<new59>"
    refused(tmp_path, make_rows(4), "pads with token", processing_class=tokenizer)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"input_ids": [[1.5, 2.0]]},
            "train_dataset: input_ids holds list<.*double>, and lists of int",
        ),
        ({"input_ids": [[[1], [2]]]}, "train_dataset: input_ids holds list<.*list<"),
        ({"input_ids": ["a", "b"], "labels": ["a", "b"]}, "input_ids holds string, and lists of"),
        ({"input_ids": [1, 2]}, "input_ids holds int.., and lists of integers are needed"),
        ({"input_ids": [[1, 2]], "labels": [None]}, "labels holds null, and lists of"),
        ({"input_ids": [[1, None]]}, "train_dataset: input_ids has nulls among rows 0 to 0"),
        ({"input_ids": [[1, 2], None]}, "train_dataset: input_ids has nulls"),
        ({"input_ids": [[1, 2], [1, 2]], "labels": [[1, 2], [1]]}, "1 of 2 rows have .* row 1"),
    ],
    ids=str,
)
def test_columns_of_another_kind(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    refused(tmp_path, Dataset.from_dict(columns), message, dataset_kwargs=UNPREPARED)


@pytest.mark.parametrize("kind", [LargeList(Value("int64")), List(Value("int32"), length=3)])
def test_lists_of_every_kind_are_counted(kind: Any) -> None:
    features = Features({"input_ids": kind})
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 9]]}, features)
    counts = count_tokens(rows, {"input_ids": 9}, None, None)
    assert (counts.rows, counts.outside) == (2, {"input_ids": (1, 1, 9)})


def test_a_transform_is_not_looked_behind(tmp_path: Path) -> None:
    stored = Dataset.from_dict({"input_ids": [[500, 600, 7]] * 4})
    served = stored.with_transform(lambda rows: {"input_ids": [[5, 6, 7]] * len(rows["input_ids"])})
    make_trainer(config(tmp_path, dataset_kwargs=UNPREPARED), served).train()


def test_what_has_no_tokens_before_training_is_looked_at_in_its_first_batch(
    tmp_path: Path, warnings: Any
) -> None:
    wrong = make_rows(4)
    wrong[1]["input_ids"][2] = wrong[1]["labels"][2] = VOCAB_SIZE
    message = r": the first batch has 1 input_ids outside the model's vocabulary \[0, 128\), the first: 128\."
    stream = as_dataset(wrong).to_iterable_dataset()
    served = as_dataset(make_rows(4)).with_transform(
        lambda rows: {**rows, "input_ids": [row["input_ids"] for row in wrong]}
    )
    for dataset, options in ((stream, {}), (served, {"dataset_kwargs": UNPREPARED})):
        trainer = make_trainer(config(tmp_path, **options), dataset)
        with pytest.raises(ValueError, match="train_dataset" + message):
            trainer.train()
    trainer = make_trainer(config(tmp_path), make_rows(4), eval_dataset=stream)
    with pytest.raises(ValueError, match="eval_dataset" + message):
        trainer.evaluate()
    # Nor is one looked at before that is given later.
    with pytest.raises(ValueError, match="eval_dataset" + message):
        trainer.evaluate(as_dataset(wrong))
    labels = make_rows(4)
    labels[0]["labels"][-1] = VOCAB_SIZE + 1
    with pytest.raises(ValueError, match=r"has 1 labels outside .*: 129\."):
        trainer.evaluate(as_dataset(labels))
    assert warnings() == []
    # TRL leaves rows out that have no label at all.
    unlabelled = [
        {**row, "labels": [5] + [-100] * (len(row["labels"]) - 1)} for row in make_rows(4)
    ]
    make_trainer(config(tmp_path), as_dataset(unlabelled).to_iterable_dataset()).train()
    assert warnings()[0].startswith("train_dataset: the first batch has no token to train on.")


def test_a_stream_without_rows(tmp_path: Path) -> None:
    refused(tmp_path, IterableDataset.from_generator(lambda: iter([])), "a stream, has no rows")


def test_weights_of_eight_bits_are_not_read() -> None:
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight = torch.nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn), requires_grad=False)
    check_weights(layer)


def test_losses_that_become_nan_and_passes_without_labels_are_told(
    tmp_path: Path, warnings: Any
) -> None:
    rows = make_rows(4)
    first, *rest = rows[1]["input_ids"]
    rows[1]["labels"] = [first] + [-100] * len(rest)
    args = config(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer = make_trainer(args, rows)
    with torch.no_grad():
        trainer.model.lm_head.weight[7] = torch.nan
    before = len(warnings())
    trainer.train()
    scored = sum(label != -100 for row in rows for label in row["labels"][1:])
    rows_with_labels = [rows[0], *rows[2:]]
    trainer.evaluate(as_dataset(rows_with_labels))
    assert warnings()[before:] == [
        f"Since the last log, {scored} of {scored} scored tokens have no finite loss.",
        "Since the last log, 1 of 4 forward passes scored no token.",
        f"In this evaluation, {scored} of {scored} scored tokens have no finite loss.",
    ]


def test_counts_over_many_batches_and_empty_rows() -> None:
    rows = [{"input_ids": [], "labels": []}]
    rows += [{"input_ids": [1, 2, 3], "labels": [-100, 2, -100]}] * 2500
    rows += [{"input_ids": [1, 2, 9], "labels": [1, -100, -100]}] * 3
    counts = count_tokens(Dataset.from_list(rows), {"input_ids": 9, "labels": 9}, 3, 3)
    assert (counts.rows, counts.unscored, counts.cut) == (2504, 4, 3)
    assert counts.outside == {"input_ids": (3, 2501, 9)}
    # In the order that rows are chosen in.
    chosen = Dataset.from_list(rows).select([2502, 0, 1])
    counts = count_tokens(chosen, {"input_ids": 9, "labels": 9}, 3, 3)
    assert (counts.rows, counts.unscored, counts.cut) == (3, 2, 1)
    assert counts.outside == {"input_ids": (1, 0, 9)}


@pytest.mark.parametrize("loss_type", ["deft", "nll"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "So?", "answer": "No"}],
         "has the columns question, answer. Needed are prompt and completion, messages, conversations, text .*, or input_ids"),
        ([{"prompt": "So?", "answer": "No"}], "has a column prompt and none named completion, only prompt, answer"),
        ([{"prompt": "So?", "completion": "No"}, {"prompt": "Why?"}],
         "1 of 2 rows have no completion, the first being row 1, counted from 0"),
        ([{"prompt": "So?", "completion": "No"}, {"text": "Why? No."}], "1 of 2 rows have no prompt, the first being row 1"),
        ([{"prompt": 1, "completion": 2}], r"the column prompt holds 1 \(int\), and text, or a list of messages with role and content, is needed"),
        ([{"messages": "So? No"}], r"the column messages holds 'So\? No' \(str\), and a list of messages with role and content is needed"),
        ([{"messages": None}], "1 of 1 rows have no messages"),
        ([{"conversations": [{"role": "user", "content": "So?"}]}],
         "the column conversations holds a list with role, content, and a list of messages with from and value is needed"),
        ([{"prompt": "So?", "completion": [{"from": "gpt", "value": "No"}]}], "the column completion holds a list with from, value"),
        ([{"text": ["So?"]}], "the column text holds .* and text is needed"),
    ],
)  # fmt: skip
def test_rows_that_trl_can_make_no_tokens_of(
    tmp_path: Path, rows: list[dict[str, Any]], message: str, loss_type: str
) -> None:
    args = config(tmp_path, loss_type=loss_type)
    keys = dict.fromkeys(key for row in rows for key in row)
    wrong = Dataset.from_dict({key: [row.get(key) for row in rows] for key in keys})
    with pytest.raises(ValueError, match=f"^train_dataset:? {message}"):
        make_trainer(args, wrong)
    with pytest.raises(ValueError, match=rf"^eval_dataset\['b'\]:? {message}"):
        make_trainer(args, pairs(), eval_dataset={"a": pairs(), "b": wrong})
    stream = wrong.to_iterable_dataset()
    if "rows have" not in message:
        with pytest.raises(ValueError, match=f"^train_dataset:? {message}"):
            make_trainer(args, stream)


USER, ASSISTANT = ({"role": role, "content": "So?"} for role in ("user", "assistant"))


@pytest.mark.parametrize("loss_type", ["deft", "nll"])
@pytest.mark.parametrize(
    ("first", "wrong", "message"),
    [
        ({"text": "a"}, {"text": 5}, r", row 5: the column text holds 5 \(int\), and text is needed. With values of several kinds in "
         "text, datasets reads a text such as '5' as a number"),
        ({"text": "a"}, {"text": {"a": 1}}, r", row 5: the column text holds \{'a': 1\} \(dict\), and text is needed"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ["b"]},
         r", row 5: the column completion holds \['b'\] \(list\), and text, or a list of messages"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": [ASSISTANT]},
         ", row 5: prompt and completion must both be text or both be lists of messages; they hold 'a' .* and a list with role"),
        ({"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": [ASSISTANT]},
         ", row 5: prompt, completion hold messages, and text in the rows before it"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {"prompt": [USER], "completion": []}, ": 1 of 8 rows have no completion, .* row 5"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {"prompt": [USER], "completion": 5}, r", row 5: the column completion holds 5"),
        ({"messages": [USER, ASSISTANT]}, {"messages": []}, ": 1 of 8 rows have no messages, the first being row 5"),
        ({"messages": [USER, ASSISTANT]}, {"messages": "x"}, r", row 5: the column messages holds 'x' \(str\), and a list of"),
        ({"messages": [USER, ASSISTANT]}, {"messages": ["x"]}, r", row 5: the column messages holds \['x'\] \(list\), and a list of"),
        ({"messages": [USER, ASSISTANT]}, {"messages": [USER, "x"]}, r", row 5: the column messages holds \[.*'x' \(list\), and a list of"),
        ({"messages": [USER, ASSISTANT]}, {"messages": [{"from": "human"}]}, ", row 5: the column messages holds a list with from, and a"),
    ],
)  # fmt: skip
def test_a_row_of_another_kind_than_the_first_is_named(
    tmp_path: Path, first: dict[str, Any], wrong: dict[str, Any], message: str, loss_type: str
) -> None:
    """As `datasets` reads a file: of values of several kinds it makes a column of JSON."""
    rows = [wrong if row == 5 else first for row in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"^train_dataset{message}"):
        make_trainer(config(tmp_path, loss_type=loss_type), data)
    # Without it there is nothing to refuse, in rows that are stored in the same column.
    make_trainer(config(tmp_path, loss_type=loss_type), data.select([0, 1, 2, 3, 4, 6, 7]))


def test_text_and_messages_in_one_row(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "So?", "completion": [ASSISTANT]}])
    refused(tmp_path, rows, "^train_dataset: prompt and completion must both be text or both be")


def test_a_text_that_is_read_as_a_number_is_explained(tmp_path: Path) -> None:
    """The first row has a text in the file."""
    rows = [{"prompt": "So?", "completion": completion} for completion in (" 0", " 1", 5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    refused(tmp_path, data, r"completion holds 0 \(int\), .* kinds in completion, datasets reads a")


MESSAGES = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "No"}]
TEXT = {"text": "So? No"}


@pytest.mark.parametrize(
    "dataset",
    [
        Dataset.from_list([{**TEXT, "conversations": "[json]"}] * 4),
        Dataset.from_list([{**TEXT, "messages": 3}] * 4),
        Dataset.from_list([{**TEXT, "messages": None}] * 4),
        Dataset.from_list([{**TEXT, "conversations": value} for value in (None, [{"from": "human", "value": "So?"}])]),
        Dataset.from_list([{**TEXT, "messages": "3"}] * 4).with_format("python", columns=["text"]),
        Dataset.from_list([{"prompt": MESSAGES[:1], "completion": MESSAGES[1:], "extra": None}] * 4),
        Dataset.from_list([{"messages": MESSAGES, "tools": None}] * 4),
        Dataset.from_list([{"conversations": [{"from": "human", "value": "So?"}, {"from": "gpt", "value": "No"}]}] * 4),
        Dataset(pa.table({"text": pa.array(["So? No"] * 4, pa.string_view())})),
    ],
    ids=lambda dataset: ",".join(dataset.column_names),
)  # fmt: skip
@pytest.mark.parametrize("loss_type", ["deft", "nll"])
def test_what_trl_makes_tokens_of_is_not_refused(
    tmp_path: Path, dataset: Dataset, loss_type: str
) -> None:
    args = config(tmp_path, loss_type=loss_type, packing=False)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    trainer = make_trainer(args, dataset, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(dataset)


def test_splits_in_place_of_one(tmp_path: Path) -> None:
    both = DatasetDict({"train": pairs(), "test": pairs()})
    refused(tmp_path, both, "train_dataset has the splits 'train', 'test'. Give one of them")


def test_rows_without_a_value_that_are_not_selected_are_no_fault(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"prompt": ["So?", "Why?"], "completion": [" No", None]})
    make_trainer(config(tmp_path), rows.select([0]))
    refused(tmp_path, rows.select([1, 0]), "1 of 2 rows have no completion, the first being row 0")


def test_columns_of_any_name_with_a_function_that_reads_them(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"question": "So?", "answer": " No"}])
    make_trainer(
        config(tmp_path), rows, formatting_func=lambda row: row["question"] + row["answer"]
    )
    make_trainer(config(tmp_path, dataset_text_field="question"), rows)
