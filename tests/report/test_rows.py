"""The report's rows are those that SFTTrainer trains on: the same tokens, labels and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from deft_plugin.report.data import in_trl_format
from deft_plugin.report.rows import IGNORED, prepare_rows
from tests.tiny import tiny_model

ASK, TELL = [{"role": "user", "content": "2 + 2"}], [{"role": "assistant", "content": "4"}]
MORE = [{"role": "user", "content": "twice?"}, {"role": "assistant", "content": "eight"}]
FORMATS: dict[str, dict[str, Any]] = {
    "prompt and completion": {"prompt": "2 + 2 =", "completion": " 4"},
    "conversational prompt and completion": {"prompt": ASK, "completion": TELL},
    "messages": {"messages": ASK + TELL + MORE},
    "conversations": {
        "conversations": [{"from": "user", "value": "2"}, {"from": "assistant", "value": "two"}]
    },
    "text": {"text": "two and two are four"},
}
# What a chat template is given beside the messages.
TOOL = {"type": "function", "function": {"name": "add", "description": "a sum", "parameters": {}}}
WITH_TOOLS = (
    "{{ tools | map(attribute='function') | map(attribute='name') | join }}{{ style }}:"
    "{% for message in messages %}{{ message['content'] }};{% endfor %}"
)


def numbered(row: dict[str, Any], count: int = 5) -> list[dict[str, Any]]:
    """Rows that differ."""

    def changed(value: Any, index: int) -> Any:
        if isinstance(value, str):
            return value + "!" * index
        return [
            {**m, **{k: m[k] + "!" * index for k in ("content", "value") if k in m}} for m in value
        ]

    return [{name: changed(value, i) for name, value in row.items()} for i in range(count)]


def trained_on(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any
) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of the batches of a trainer with a model of its own."""
    arguments = SFTConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **options
    )
    trainer = SFTTrainer(
        model=tiny_model("llama"), args=arguments, train_dataset=data, processing_class=tokenizer
    )
    columns = ("input_ids", "labels")
    batches = [
        trainer.data_collator([{k: row[k] for k in columns}]) for row in trainer.train_dataset
    ]
    return [tuple(batch[name][0].tolist() for name in columns) for batch in batches]  # type: ignore[misc]


@pytest.mark.parametrize("limit", ["none", "generous", "cuts"])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_of_the_trainer(
    name: str, limit: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = in_trl_format(Dataset.from_list(numbered(FORMATS[name])), name)
    whole = prepare_rows(data, tokenizer, rows=99, max_length=None)
    longest = max(len(row.input_ids) for row in whole.rows)
    max_length = {"none": None, "generous": 1024, "cuts": longest - 2}[limit]
    expected = trained_on(data, tokenizer, tmp_path, max_length=max_length)
    sample = prepare_rows(data, tokenizer, rows=99, max_length=max_length)
    assert [(row.input_ids, row.labels) for row in sample.rows] == expected
    assert sample.tokens == sum(label != IGNORED for _, labels in expected for label in labels[1:])


def test_tools_and_arguments_of_the_template_are_the_trainer_s_too(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = WITH_TOOLS
    row = {"messages": ASK + TELL, "tools": [TOOL], "chat_template_kwargs": {"style": "terse"}}
    raw = Dataset.from_list([row, {**row, "messages": ASK + TELL + MORE}])
    expected = trained_on(raw, tokenizer, tmp_path)
    named = raw.rename_column("messages", "talk")
    for data in (in_trl_format(raw, "raw"), in_trl_format(named, "named", "talk")):
        sample = prepare_rows(data, tokenizer, rows=9)
        assert [(row.input_ids, row.labels) for row in sample.rows] == expected
        assert tokenizer.decode(sample.rows[0].input_ids).startswith("addterse:")


def test_images_are_not_left_out_without_a_word() -> None:
    data = Dataset.from_list([{"messages": ASK + TELL, "images": ["a.png"]}])
    with pytest.raises(ValueError, match=r"'mine' has the column images.*: --columns messages"):
        in_trl_format(data, "mine")
    assert in_trl_format(data, "mine", "messages").column_names == ["messages"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}], "row 1: completion is None"),
        ([{"prompt": 1, "completion": 2}], "row 0: prompt is 1"),
        ([{"text": 2.5}], "row 0: text is 2.5"),
        ([{"messages": None}, {"messages": ASK + TELL}], "row 0: messages is None"),
        ([{"conversations": None}, FORMATS["conversations"]], "row 0: conversations is None"),
        ([{"messages": "a text"}], "row 0: messages is 'a text'"),
        ([{"messages": ["a", "b"]}], r"row 0: messages is \['a', 'b'\]"),
        ([{"text": ["a"]}], r"row 0: text is \['a'\]"),
        ([{"prompt": "a", "completion": TELL}], "prompt and completion"),
        ([{"messages": ASK + TELL}, {"messages": []}], r"row 1: messages is \[\]; it must be a list of messages"),
        ([{"messages": []}, {"messages": ASK + TELL}], r"row 0: messages is \[\]"),
        ([{"prompt": ASK, "completion": []}, {"prompt": ASK, "completion": TELL}], r"row 0: completion is \[\]"),
        ([{"conversations": []}, FORMATS["conversations"]], r"row 0: conversations is \[\]"),
    ],
)  # fmt: skip
def test_what_is_neither_text_nor_messages_is_named_with_its_row(
    rows: list[dict[str, Any]], message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=f"--data 'mine'[,:]? {message}"):
        prepare_rows(in_trl_format(Dataset.from_list(rows), "mine"), tokenizer, rows=9, name="mine")


@pytest.mark.parametrize("columns", ["q,a", " q , a "])
def test_columns_may_have_spaces_between(columns: str) -> None:
    data = Dataset.from_list([{"q": "1", "a": "2", "b": "3"}])
    assert in_trl_format(data, "mine", columns).to_list() == [{"prompt": "1", "completion": "2"}]
    with pytest.raises(ValueError, match="--columns 'q,q' must be one or two of"):
        in_trl_format(data, "mine", "q,q")


def test_only_the_assistant_s_words_count_where_the_trainer_is_told_so(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = Dataset.from_list(numbered(FORMATS["messages"]))
    expected = trained_on(data, tokenizer, tmp_path, assistant_only_loss=True)
    sample = prepare_rows(data, tokenizer, rows=99, assistant_only=True)
    assert [(row.input_ids, row.labels) for row in sample.rows] == expected
    assert sample.tokens < prepare_rows(data, tokenizer, rows=99).tokens


def test_a_sample_keeps_the_numbers_of_its_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    data = Dataset.from_list([{"text": f"number {number:02}"} for number in range(50)])
    sample = prepare_rows(data, tokenizer, rows=7, seed=3)
    texts = [tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in sample.rows]
    assert texts == [f"number {row.number:02}" for row in sample.rows]
    assert (sample.drawn, sample.available) == (7, 50)
    numbers = [row.number for row in sample.rows]
    again = prepare_rows(data, tokenizer, rows=7, seed=3)
    assert numbers == sorted({*numbers}) == [row.number for row in again.rows]
    assert numbers != [row.number for row in prepare_rows(data, tokenizer, rows=7, seed=4).rows]


def test_rows_without_a_token_to_train_on_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = ("short", "a prompt that fills all of it", "tiny")
    data = Dataset.from_list([{"prompt": prompt, "completion": "x"} for prompt in prompts])
    for max_length in (10, None):
        sample = prepare_rows(data, tokenizer, rows=9, max_length=max_length)
        assert sample.unscored == ([1] if max_length else [])
        assert len(sample.rows) == 3 - len(sample.unscored)
    with pytest.raises(ValueError, match=r"'mine': none of the 3 rows .* within --max-length 3\."):
        prepare_rows(data, tokenizer, rows=9, max_length=3, name="mine")


def test_an_empty_completion_teaches_to_stop(tokenizer: PreTrainedTokenizerBase) -> None:
    data = Dataset.from_list([{"prompt": "nothing:", "completion": ""}])
    (row,) = prepare_rows(data, tokenizer, rows=9).rows
    assert [row.labels[at] for at in row.scored] == [tokenizer.eos_token_id]


def test_what_cannot_be_prepared_is_told_in_a_sentence(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="--data 'none' has no rows"):
        prepare_rows(Dataset.from_dict({"text": []}), tokenizer, rows=1, name="none")
    data = Dataset.from_list([FORMATS["messages"]])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"'chats' is conversational.*--chat-template"):
        prepare_rows(data, tokenizer, rows=1, name="chats")
