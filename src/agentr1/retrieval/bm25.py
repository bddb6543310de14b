"""Lexical ranking of passages in process: Okapi BM25 over words, on the bm25s library.

Layer 1. The index of laptops and of the quickstart: no server, no model, no torch, and the same
order for the same query everywhere, since ties are broken by the place in the corpus.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import bm25s
import numpy as np

from agentr1.retrieval.base import Passage

_WORD = re.compile(r"\w+")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class Bm25Index:
    """A ranked search over titles and texts, compared by lower-cased whole words.

    Args:
        passages: the corpus, at least one passage.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        if not passages:
            raise ValueError("expected at least one passage to index, got none: check the corpus")
        self._passages = tuple(passages)
        self._bm25 = bm25s.BM25(method="lucene", backend="numpy")
        words = [_words(f"{passage.title} {passage.text}") for passage in self._passages]
        self._bm25.index(words, show_progress=False)

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, query: str, k: int) -> list[Passage]:
        """Return at most `k` passages that share a word with the query, best first."""
        if k < 1:
            raise ValueError(f"expected k of at least 1, got {k}")
        word_ids = self._bm25.get_tokens_ids(_words(query))
        if not word_ids:
            return []
        scores = self._bm25.get_scores_from_ids(word_ids)  # (passages,)
        return [self._passages[index] for index in _best(scores, k)]


def _best(scores: np.ndarray, k: int) -> list[int]:
    """Indices of the `k` highest positive scores; the earlier passage wins a tie."""
    # Only the candidates are sorted: a full sort costs milliseconds on a corpus of some size.
    floor = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
    candidates = np.flatnonzero((scores >= floor) & (scores > 0.0))
    order = np.argsort(-scores[candidates], kind="stable")[:k]
    return candidates[order].tolist()
