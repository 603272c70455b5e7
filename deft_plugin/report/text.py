"""Tokens as text that can be read: one piece for each, also where a character is spread over several.

A token is decoded in its place, as what it adds to the tokens before it, since what a tokenizer makes of a token alone
may lack its leading space. Of a character that is spread over several tokens the last one shows it, and the others say
which part of it they are.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
# Tokens that are decoded with one, so that it has its leading space.
_CONTEXT = 4
# A character has four bytes at most, and a token may be one byte.
_MOST_PARTS = 8
_MARKS = {" ": " ", "\n": "↵", "\t": "→", "\r": "␍"}
# Control characters, those that turn the direction of writing, other spaces, what is in no font.
_UNSEEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"})
# In the middle of a text they make one sign of two.
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class Piece:
    """What a token adds to the text.

    Args:
        text: as decoded; "" for all but the last part of a character spread over several tokens.
        is_special: whether it is a mark of the tokenizer's (the end of a turn), not text.
        part, parts: which part of such a character it is, from 1, and of how many; 1 of 1 for whole text.
        whole: the text that the parts make together; "" where there is none.
    """

    text: str
    is_special: bool = False
    part: int = 1
    parts: int = 1
    whole: str = ""

    @property
    def visible(self) -> str:
        """One line in which everything is seen: spaces at the ends, new lines, control characters."""
        text = visible(self.whole or self.text)
        return text if self.parts == 1 else f"{text} [part {self.part} of {self.parts}]"


class Decoder:
    """Turns the tokens of one tokenizer into text.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        marked = (token for token, content in added.items() if getattr(content, "special", False))
        self.special = frozenset([*tokenizer.all_special_ids, *marked])

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """A piece for each token of a row."""
        pieces: list[Piece] = []
        waiting: list[int] = []  # Positions of the parts of a character that is not complete.
        for position, token in enumerate(ids):
            if token in self.special:
                pieces += [Piece(REPLACEMENT)] * len(waiting)
                waiting = []
                pieces.append(Piece(self._decode([token]), is_special=True))
                continue
            waiting.append(position)
            text = self._added(ids, waiting[0], position + 1)
            parts = len(waiting)
            goes_on = parts < _MOST_PARTS and position + 1 < len(ids)
            if goes_on and not self._is_complete([ids[at] for at in waiting], text):
                continue
            pieces += [Piece("", part=part, parts=parts, whole=text) for part in range(1, parts)]
            pieces.append(Piece(text, part=parts, parts=parts, whole=text))
            waiting = []
        return pieces + [Piece(REPLACEMENT)] * len(waiting)

    def text_at(self, before: Sequence[int], token: int) -> str:
        """What a token would add after those before it, as `visible` shows it."""
        if token in self.special:
            return visible(self._decode([token]))
        ids = [*before[-_CONTEXT:], token]
        text = self._added(ids, len(ids) - 1, len(ids))
        if not self._is_complete([token], text):
            return f"⟨{self.raw_bytes(token).hex(' ').upper()}⟩"
        return visible(text)

    def raw_bytes(self, token: int) -> bytes:
        """What a token stands for, also where that is a part of a character."""
        name = str(self.tokenizer.convert_ids_to_tokens(token))
        if name.startswith("<0x") and name.endswith(">"):  # SentencePiece's bytes.
            return bytes.fromhex(name[3:-1])
        alphabet = _byte_alphabet()
        if all(character in alphabet for character in name):
            return bytes(alphabet[character] for character in name)
        return name.replace("▁", " ").encode(errors="replace")

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def _added(self, ids: Sequence[int], start: int, end: int) -> str:
        """What ids[start:end] add to the text of a few tokens before them."""
        first = start
        # A decoder may drop the space after a special token.
        while first > 0 and start - first < _CONTEXT and ids[first - 1] not in self.special:
            first -= 1
        before, together = self._decode(ids[first:start]), self._decode(ids[first:end])
        if before.endswith(REPLACEMENT) or not together.startswith(before):
            return self._decode(ids[start:end])
        return together[len(before) :]

    def _is_complete(self, tokens: Sequence[int], text: str) -> bool:
        """Whether tokens end where a character does; text itself may have the sign for one that does not."""
        if not text.endswith(REPLACEMENT):
            return True
        try:
            b"".join(self.raw_bytes(token) for token in tokens).decode()
        except UnicodeDecodeError:
            return False
        return True


def visible(text: str) -> str:
    """`text` in one line, with marks for what cannot be seen."""
    if not text:
        return "⟨nothing⟩"
    shown = "".join(_shown(text, at) for at in range(len(text)))
    if shown.startswith(" "):
        shown = "␣" + shown[1:]
    if shown.endswith(" "):
        shown = shown[:-1] + "␣"
    return shown


def flowing(text: str) -> str:
    """`text` for a page that keeps white space: new lines and tabs are marked and kept."""
    return "".join(
        _shown(text, at) + (character if character in "\n\t" else "")
        for at, character in enumerate(text)
    )


def _shown(text: str, at: int) -> str:
    """A character, or a mark for one that cannot be seen or would change how what is around it is seen."""
    character = text[at]
    if character in _MARKS:
        return _MARKS[character]
    category = unicodedata.category(character)
    if category[0] == "M" and at == 0:
        return "◌" + character
    if character in _JOINERS and 0 < at < len(text) - 1:
        return character
    return f"⟨U+{ord(character):04X}⟩" if category in _UNSEEN else character


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with: printable ones are their own."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet
