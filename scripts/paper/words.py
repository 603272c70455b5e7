"""How alike two words are: the similarity of Jaro and Winkler, by the library `rapidfuzz`."""

from __future__ import annotations

from rapidfuzz.distance import Jaro, JaroWinkler

_PREFIX_WEIGHT = 0.1
_LONGEST_PREFIX = 4


def jaro_winkler(said: str, word: str) -> float:
    """Jaro-Winkler similarity in [0, 1] as the paper has it: letter case and outer spaces apart, and a common prefix
    counts for words of any similarity.
    """
    said, word = _normalised(said), _normalised(word)
    similarity: float = Jaro.similarity(said, word)
    prefix = 0
    for a, b in zip(said[:_LONGEST_PREFIX], word, strict=False):
        if a != b:
            break
        prefix += 1
    return similarity + prefix * _PREFIX_WEIGHT * (1 - similarity)


def winklers(said: str, word: str) -> float:
    """The same as Winkler published it: a prefix counts where the similarity without it is above 0.7."""
    similarity: float = JaroWinkler.similarity(
        _normalised(said), _normalised(word), prefix_weight=_PREFIX_WEIGHT
    )
    return similarity


def is_exact(said: str, word: str) -> bool:
    """Whether it is the word, letter case and outer spaces apart."""
    return _normalised(said) == _normalised(word)


def _normalised(text: str) -> str:
    return text.strip().lower()
