"""How questions are put to models: chat templates, and the tokens that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerBase

from tests.tiny import tiny_tokenizer

pytest.importorskip("typer", reason="needs the extra `paper`")
from paper.chat import LLAMA3_END, LLAMA3_PAD, LLAMA3_TEMPLATE, load_tokenizer, prompt_ids, stop_ids

ROOT = Path(__file__).parents[2]
BASE_MODEL = str(ROOT / "assets/base_model")
SMOLLM2 = ROOT / "runs/models/SmolLM2-135M-Instruct"
CONVERSATIONS = [
    [{"role": "user", "content": " 2 + 2? \n"}],
    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "\n4 "}],
    [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3?"},
    ],
]


def llama3_base() -> PreTrainedTokenizerBase:
    """A tokenizer as a Llama 3 base model has it: the tokens of a chat, no template, no padding."""
    tokenizer = tiny_tokenizer()
    names = ["<|start_header_id|>", "<|end_header_id|>", LLAMA3_END, LLAMA3_PAD]
    tokenizer.add_special_tokens({"extra_special_tokens": names})
    tokenizer.chat_template = None
    tokenizer.pad_token = None
    return tokenizer


@pytest.fixture
def llama3_folder(tmp_path: Path) -> str:
    llama3_base().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.skipif(
    not (Path(trl.__file__).parent / "chat_templates/llama3.jinja").exists(),
    reason="this version of TRL has no such file",
)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_llama_3_template_says_what_trls_does(conversation: list[dict[str, Any]]) -> None:
    tokenizer = tiny_tokenizer()
    theirs = (Path(trl.__file__).parent / "chat_templates/llama3.jinja").read_text()
    for prompt in (False, True):
        said = [
            tokenizer.apply_chat_template(
                conversation, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
            for template in (LLAMA3_TEMPLATE.read_text(), theirs)
        ]
        assert said[0] == said[1]


def test_a_llama_3_base_model_gets_its_familys_chat(llama3_folder: str) -> None:
    tokenizer = load_tokenizer(llama3_folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (LLAMA3_END, LLAMA3_PAD)
    asked = tokenizer.decode(prompt_ids(tokenizer, "2?"))
    assert asked == (
        "<bos><|start_header_id|>user<|end_header_id|>\n\n2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert stop_ids(tokenizer) == [tokenizer.convert_tokens_to_ids(LLAMA3_END)]


def test_the_token_that_a_template_ends_an_answer_with_stops_too() -> None:
    """As with a base model of Qwen2.5, whose end of text is another."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<bos>"
    assert stop_ids(tokenizer) == [1, 2]


def test_the_shipped_model_and_a_real_one() -> None:
    tokenizer = load_tokenizer(BASE_MODEL)
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]
    assert (
        tokenizer.decode(prompt_ids(tokenizer, "2?")) == "<|begin|><|user|>2?<|end|><|assistant|>"
    )
    if SMOLLM2.exists():
        tokenizer = load_tokenizer(str(SMOLLM2))
        assert tokenizer.convert_ids_to_tokens(stop_ids(tokenizer)) == ["<|im_end|>"]


def test_a_model_without_a_template_needs_one(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template: name a Jinja file"):
        load_tokenizer(str(tmp_path))
    file = tmp_path / "own.jinja"
    file.write_text(str(template))
    assert load_tokenizer(str(tmp_path), file).chat_template == template


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match="'no/such' is neither a model's folder nor"):
        load_tokenizer("no/such")
