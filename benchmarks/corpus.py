"""A corpus of any size that is no text but counts like one, and questions to it.

Words are drawn by Zipf's law with Mandelbrot's shift, as in English: the most frequent stands in
nearly every passage, most others in a handful. What a lexical search costs depends on just that.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WORDS_A_PASSAGE, WORDS_A_QUESTION = 80, 12
"""As in HotpotQA's passages and questions, medians."""
_SHIFT, _EXPONENT = 2.7, 1.15
_SYLLABLES = tuple("".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou"))
_BLOCK = 10_000


class Language:
    """Words by their rank.

    Args:
        words: how many there are.
        seed: of all draws.
    """

    def __init__(self, words: int, seed: int) -> None:
        weights = 1.0 / (np.arange(1, words + 1) + _SHIFT) ** _EXPONENT
        self._ends = np.cumsum(weights / weights.sum())
        self.words = np.array([_spelled(rank) for rank in range(words)], dtype=object)
        self.random = np.random.default_rng(seed)

    def draw(self, count: int) -> np.ndarray:
        """Words as they come in a text."""
        ranks = np.searchsorted(self._ends, self.random.random(count), side="right")
        return self.words[np.minimum(ranks, len(self.words) - 1)]


def write_corpus(path: Path, passages: int, seed: int = 0) -> None:
    """Write a passages file; the same for the same arguments."""
    language = Language(_vocabulary(passages), seed)
    aside = path.with_suffix(".part")
    with aside.open("w", encoding="utf-8") as file:
        for start in range(0, passages, _BLOCK):
            count = min(_BLOCK, passages - start)
            file.writelines(f"{line}\n" for line in _block(language, start, count))
    aside.replace(path)


def questions(passages: int, count: int, seed: int = 0) -> list[str]:
    """Questions to that corpus: what every text is full of, and some words that are rarer."""
    language = Language(_vocabulary(passages), seed + 1)
    asked = []
    lengths = language.random.lognormal(np.log(WORDS_A_QUESTION), 0.45, count).astype(int) + 1
    for length in lengths:
        rare = language.words[language.random.integers(200, len(language.words) // 4, size=3)]
        asked.append(" ".join([*language.draw(length), *rare]) + "?")
    return asked


def _block(language: Language, start: int, count: int) -> Iterator[str]:
    lengths = language.random.lognormal(np.log(WORDS_A_PASSAGE), 0.4, count).astype(int) + 5
    words = language.draw(int(lengths.sum()))
    rare = language.random.integers(100, len(language.words), size=(count, 2))
    ends = np.cumsum(lengths)
    for place in range(count):
        text = " ".join(words[ends[place] - lengths[place] : ends[place]])
        title = " ".join(language.words[rare[place]]).title()
        yield json.dumps({"id": str(start + place), "title": title, "text": f"{title} {text}."})


def _vocabulary(passages: int) -> int:
    """Heaps' law: a corpus of a million passages has about half a million words."""
    return max(2000, int(500 * passages**0.5))


def _spelled(rank: int) -> str:
    """A word of its own for each rank, shorter for the frequent ones."""
    syllables = []
    rank += 1
    while rank:
        rank, syllable = divmod(rank - 1, len(_SYLLABLES))
        syllables.append(_SYLLABLES[syllable])
    return "".join(syllables)
