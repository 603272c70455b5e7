"""Jaro-Winkler similarity: published values, the definition, and where the paper's differs from Winkler's."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

pytest.importorskip("rapidfuzz", reason="needs the extra `paper`")
from paper.words import is_exact, jaro_winkler, winklers


@pytest.mark.parametrize(
    ("said", "word", "expected"),
    [
        # Winkler's examples.
        ("MARTHA", "MARHTA", 0.961),
        ("DIXON", "DICKSONX", 0.813),
        ("DWAYNE", "DUANE", 0.840),
        ("JELLYFISH", "SMELLYFISH", 0.896),
        ("A", "A", 1),
        ("A", "B", 0),
        ("", "A", 0),
    ],
)
def test_published_values(said: str, word: str, expected: float) -> None:
    for similarity in (jaro_winkler, winklers):
        assert similarity(said, word) == pytest.approx(expected, abs=5e-4)
        assert similarity(word, said) == pytest.approx(expected, abs=5e-4)


def test_letter_case_and_outer_spaces_do_not_count() -> None:
    assert jaro_winkler(" hat\n", "HAT") == winklers(" hat\n", "HAT") == 1
    assert is_exact(" hat\n", "HAT")
    assert not is_exact("hats", "HAT")


def test_a_prefix_of_unlike_words_counts_in_the_papers() -> None:
    # One letter of four and five in common, the first: Jaro (1/4 + 1/5 + 1) / 3 = 0.4833.
    jaro = (1 / 4 + 1 / 5 + 1) / 3
    assert winklers("axyz", "abcde") == pytest.approx(jaro)
    assert jaro_winkler("axyz", "abcde") == pytest.approx(jaro + 0.1 * (1 - jaro))


def definition(said: str, word: str) -> tuple[Fraction, int]:
    """Jaro's similarity in fractions, after its definition, and the number of matches out of order."""
    window = max(max(len(said), len(word)) // 2 - 1, 0)
    taken: list[int] = []
    for i, letter in enumerate(said):
        near = range(max(0, i - window), min(len(word), i + window + 1))
        taken += [j for j in near if j not in taken and word[j] == letter][:1]
    if not taken:
        return Fraction(0), 0
    matched = [letter for i, letter in enumerate(said) if _matches(said, word, window, i)]
    moved = sum(a != b for a, b in zip(matched, (word[j] for j in sorted(taken)), strict=True))
    m = len(taken)
    return (Fraction(m, len(said)) + Fraction(m, len(word)) + 1 - Fraction(moved, 2 * m)) / 3, moved


def _matches(said: str, word: str, window: int, index: int) -> bool:
    taken: list[int] = []
    for i, letter in enumerate(said[: index + 1]):
        near = range(max(0, i - window), min(len(word), i + window + 1))
        found = [j for j in near if j not in taken and word[j] == letter][:1]
        taken += found
    return bool(found)


def test_words_of_figfont_after_the_definition() -> None:
    generator = random.Random(0)
    compared = 0
    for _ in range(3000):
        said, word = ("".join(generator.choices("abc", k=generator.randint(2, 5))) for _ in "12")
        jaro, moved = definition(said, word)
        # A half transposition is rounded by the library; words of up to five letters have none.
        assert moved % 2 == 0
        prefix = next((n for n in range(4) if said[n : n + 1] != word[n : n + 1]), 4)
        prefix = min(prefix, len(said), len(word))
        expected = jaro + Fraction(prefix, 10) * (1 - jaro)
        assert jaro_winkler(said, word) == pytest.approx(float(expected), abs=1e-12)
        compared += 0 < jaro < 1
    assert compared > 1000
