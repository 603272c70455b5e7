"""How a question is put to a model: its tokenizer with a chat template, and the tokens that end an answer."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

LLAMA3_TEMPLATE = Path(__file__).parent / "llama3.jinja"
LLAMA3_PAD = "<|finetune_right_pad_id|>"
LLAMA3_END = "<|eot_id|>"
_ANSWER = "ANSWER"


def load_tokenizer(
    model: str, chat_template: Path | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """A model's tokenizer with a chat template and a padding token.

    A base model of the Llama 3 family has the tokens of a chat and no template: it gets the family's.

    Raises:
        ValueError: there is no such model, or it has no template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model!r} is neither a model's folder nor a model on the hub: {textwrap.shorten(str(error), 200)}"
        ) from None
    vocabulary = tokenizer.get_vocab()
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text()
    elif tokenizer.chat_template is None and LLAMA3_END in vocabulary:
        tokenizer.chat_template = LLAMA3_TEMPLATE.read_text()
        tokenizer.eos_token = LLAMA3_END
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{model!r} has no chat template: name a Jinja file with --chat-template, the same for training and "
            "evaluation."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = LLAMA3_PAD if LLAMA3_PAD in vocabulary else tokenizer.eos_token
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The tokens of a question, up to where the answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: end of text, and what the chat template ends an answer with."""
    conversation: list[dict[str, Any]] = [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": _ANSWER},
    ]
    text: str = tokenizer.apply_chat_template(conversation, tokenize=False)
    after = text.rpartition(_ANSWER)[2]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    end = [
        token
        for token in tokenizer(after, add_special_tokens=False)["input_ids"]
        if token in special
    ]
    return sorted({tokenizer.eos_token_id, *end[:1]} - {None})
