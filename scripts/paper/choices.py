"""Which option an answer to a multiple-choice question takes.

A box counts before anything else, then statements like "the answer is", then an answer or a last line that is an option
and nothing else. Of several boxes or statements the last one counts, since a model that reasons changes its mind. An
answer that takes no option, or several at once, is None: it counts as wrong, and nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_MARKUP = re.compile(r"\\(?:text|textbf|mathbf|mathrm|rm|bf)\b|[*_$`{}]")
_BEFORE = r"[\s(\[\"']*"
# No word, no "D-dimer".
_AFTER = r"(?![\w'\u2019]|-\w)"
_LEAD_IN = re.compile(
    r"\s*(?i:so|therefore|thus|hence|clearly|likely|most likely|probably|the|final|answer|option|choice|letter)\b[\s,:]*"
)


def taken_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer takes, or None.

    Args:
        answer: what a model says.
        options: the options' texts by letter.
    """
    boxes = _BOX.findall(answer)
    if boxes:
        return _read(_without_lead_in(_plain(boxes[-1])), options)
    plain = _plain(answer)
    for pattern in _statements("".join(options)):
        stated = list(re.finditer(pattern, plain))
        if stated:
            return _read(_without_lead_in(plain[stated[-1].end() :]), options, more_may_follow=True)
    lines = plain.strip().splitlines() or [""]
    alone = {line.strip(" ().:") for line in lines} - {""}
    if len(alone) > 1 and alone <= {*options}:
        return None
    # The question's options said again are no answer, but a line after them may be.
    listed = [line for line in lines if _is_listing(line, options)]
    if len(set(listed)) > 1:
        return None if lines[-1] in listed else _read(_without_lead_in(lines[-1]), options)
    return _read(plain, options) or _read(_without_lead_in(lines[-1]), options)


def _is_listing(line: str, options: Mapping[str, str]) -> bool:
    letter, _, text = line.strip().partition(" ")
    letter = letter.strip("().:")
    return letter in options and _words(text) == _words(options[letter])


def _statements(letters: str) -> tuple[str, ...]:
    """Patterns that end where the option is about to be named."""
    return (
        # "the answer is", "Answer:", "the correct option would be"
        r"(?i:\b(?:answer|option|choice)\b(?:\s*(?::|=|-\s|\bis\b|\bwas\b|\bwould be\b|\bshould be\b|\bmust be\b))+)",
        # "B is correct", "(B) is the best answer"
        rf"(?<![\w'\u2019])(?=[{letters}]\)?\s+(?i:is|would be)\s+(?i:the\s+)?(?i:(?!not\b|never\b)\w+\s+)?"
        r"(?i:correct|right|best|answer)\b)",
        # "I choose option"
        r"(?i:\b(?:choose|select|pick|go with)\b(?:\s+(?:option|choice|answer))?)(?=\s)",
    )


def _plain(text: str) -> str:
    return _MARKUP.sub("", text)


def _without_lead_in(text: str) -> str:
    while lead_in := _LEAD_IN.match(text):
        text = text[lead_in.end() :]
    return text


def _read(text: str, options: Mapping[str, str], *, more_may_follow: bool = False) -> str | None:
    """The option that a text begins with, as a letter, a letter with the option's text, or that text alone.

    Args:
        text: without markup.
        options: the options' texts by letter.
        more_may_follow: whether an explanation may follow in the same line, as in "B because".
    """
    letters = "".join(options)
    named = _named(text, options)
    start = re.match(rf"{_BEFORE}([{letters}]){_AFTER}(.*)", text, re.DOTALL)
    if start:
        letter, rest = start.groups()
        if re.match(rf"[\s)\].]*(?:,|/|&|\band\b|\bor\b)\s*[(\[]*[{letters}]{_AFTER}", rest):
            return None
        if _words(rest).startswith(_words(options[letter])):
            return letter
        # "E. coli" is not option E, nor is "E. coli is the cause" anything to be sure of.
        if named is not None or any(
            " " in _words(option) and _words(text).startswith(_words(option))
            for option in options.values()
        ):
            return named
        if more_may_follow or re.match(r"\s*$|\s*\n|\s*[)\].:;,\"']|\s+[-\u2013\u2014]\s", rest):
            return letter
        return None
    small = re.match(rf"\s*\(([{letters.lower()}])\)|\s*([{letters.lower()}])\s*[.)]?\s*$", text)
    if small:
        return (small[1] or small[2]).upper()
    return named


def _named(text: str, options: Mapping[str, str]) -> str | None:
    """The option whose text this is, up to the end of the line or of the clause."""
    line = text.strip().partition("\n")[0]
    clause = re.split(r"[.,;:]\s|\b(?:because|since|as|which|due to)\b", line)[0]
    for said in (line, clause):
        same = [letter for letter, option in options.items() if _words(option) == _words(said)]
        if len(same) == 1:
            return same[0]
    return None


def _words(text: str) -> str:
    return " ".join(re.findall(r"[\w%+<>=≥≤-]+", text.casefold())).strip(" -")
