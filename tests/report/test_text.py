"""Tokens as text: characters over several tokens, special tokens, what cannot be seen."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deft_plugin.report.text import Decoder, flowing, visible

from .conftest import BASE_MODEL


@pytest.fixture(scope="module")
def in_bytes() -> PreTrainedTokenizerBase:
    """A tokenizer of single bytes."""
    return AutoTokenizer.from_pretrained(BASE_MODEL)


@pytest.fixture(scope="module")
def sentence_piece() -> PreTrainedTokenizerBase:
    """One that writes spaces as ▁ and rare characters as bytes, as Llama 2's does."""
    vocabulary = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁the",
        "▁cat",
        "s",
        "▁",
    ]
    tokenizer = Tokenizer(
        models.BPE({token: index for index, token in enumerate(vocabulary)}, [], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TEXTS = ["plain words", "  two  spaces ", "new\n\nlines\tand tabs", "κόσμε", "日本語", "🦩👩‍👩‍👧", "e\u0301", "\ufffd here", "a\ufffd"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text_together(text: str, in_bytes: PreTrainedTokenizerBase) -> None:
    ids = in_bytes(text).input_ids
    pieces = Decoder(in_bytes).pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(piece.text for piece in pieces) == text


def test_a_character_over_four_tokens(in_bytes: PreTrainedTokenizerBase) -> None:
    ids = in_bytes("a🦩").input_ids
    first, *parts = Decoder(in_bytes).pieces(ids)
    assert first.visible == "a"
    assert [part.text for part in parts] == ["", "", "", "🦩"]
    assert [part.visible for part in parts] == [f"🦩 [part {n} of 4]" for n in (1, 2, 3, 4)]


def test_what_never_becomes_a_character_is_shown_as_such(in_bytes: PreTrainedTokenizerBase) -> None:
    ids = in_bytes("🦩").input_ids
    stop = in_bytes.eos_token_id
    decoder = Decoder(in_bytes)
    *parts, end = decoder.pieces([*ids[:2], stop])
    assert [part.visible for part in parts] == ["\ufffd", "\ufffd"]
    assert end.is_special
    assert len(decoder.pieces(ids[:3])) == 3
    assert decoder.text_at(in_bytes("x").input_ids, ids[0]) == "⟨F0⟩"
    assert decoder.text_at([], stop) == in_bytes.eos_token


def test_spaces_that_a_decoder_drops_at_the_start_are_kept(
    sentence_piece: PreTrainedTokenizerBase,
) -> None:
    names = ["▁the", "▁cat", "s", "▁", "<0xF0>", "<0x9F>", "<0xA6>", "<0xA9>", "</s>"]
    ids = sentence_piece.convert_tokens_to_ids(names)
    decoder = Decoder(sentence_piece)
    pieces = decoder.pieces(ids)
    assert [piece.text for piece in pieces] == ["the", " cat", "s", " ", "", "", "", "🦩", "</s>"]
    assert pieces[-1].is_special
    assert decoder.text_at(ids[:2], ids[0]) == "␣the"
    assert decoder.text_at(ids[:2], ids[4]) == "⟨F0⟩"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "␣the"),
        (" ", "␣"),
        ("\n\n", "↵↵"),
        ("a\r\tb", "a␍→b"),
        ("\u202eabc", "⟨U+202E⟩abc"),
        ("\x00", "⟨U+0000⟩"),
        ("\u00a0", "⟨U+00A0⟩"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("\u200d", "⟨U+200D⟩"),
        ("", "⟨nothing⟩"),
    ],
)
def test_what_cannot_be_seen_has_a_mark(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_on_the_page_new_lines_are_marked_and_kept() -> None:
    assert flowing("a\n\tb ") == "a↵\n→\tb "
