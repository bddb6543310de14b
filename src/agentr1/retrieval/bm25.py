"""Lexical ranking of passages: Okapi BM25 over words, on the bm25s library.

Layer 1. The index of laptops and of the quickstart: no server, no model, no torch, and the same
order for the same query everywhere, since ties are broken by the place in the corpus. A list is
indexed in memory; `postings.py` builds a folder of the same numbers for a corpus of any size, and
`Bm25Index.open` maps it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import bm25s
import numpy as np

from agentr1.retrieval.base import Hit, Passage

METHOD = "lucene"
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Split a text as both passages and queries are: lower-cased runs of letters and digits.

    Letters are compared however they are encoded: an accent of its own, a ligature, a wide letter.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def no_words() -> ValueError:
    """The error for a corpus that no query can find anything in."""
    return ValueError("no passage holds a word, expected letters or digits: check the corpus")


class Bm25Index:
    """A ranked search over titles and texts, compared by lower-cased whole words.

    Args:
        passages: the corpus, at least one passage.
        ranker: numbers already there for these passages; by default they are computed, in memory.
    """

    def __init__(self, passages: Sequence[Passage], ranker: bm25s.BM25 | None = None) -> None:
        if not passages:
            raise ValueError("expected at least one passage to index, got none: check the corpus")
        self.passages = passages
        if ranker is None:
            ranker = bm25s.BM25(method=METHOD, backend="numpy")
            words = [words_of(f"{passage.title} {passage.text}") for passage in passages]
            if not any(words):
                raise no_words()
            ranker.index(words, show_progress=False)
        self._bm25 = ranker

    @classmethod
    def open(cls, folder: Path, passages: Sequence[Passage]) -> Bm25Index:
        """Map an index that was built into a folder; only its vocabulary is read into memory."""
        return cls(passages, bm25s.BM25.load(folder, mmap=True))

    def __len__(self) -> int:
        return len(self.passages)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return per query at most `k` passages that share a word with it, best first."""
        return [
            [Hit(self.passages[place], score) for place, score in ranking]
            for ranking in self.rank(queries, k)
        ]

    def rank(self, queries: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """Return per query the places in the corpus that `search` finds, with their scores."""
        if k < 1:
            raise ValueError(f"expected k of at least 1, got {k}")
        return [self._rank(query, k) for query in queries]

    def _rank(self, query: str, k: int) -> list[tuple[int, float]]:
        word_ids = self._bm25.get_tokens_ids(words_of(query))
        if not word_ids:
            return []
        scores = self._bm25.get_scores_from_ids(word_ids)
        # Only what may be among the best is sorted.
        least = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
        places = np.flatnonzero((scores >= least) & (scores > 0.0))
        best = places[np.argsort(-scores[places], kind="stable")[:k]]
        return list(zip(best.tolist(), scores[best].tolist(), strict=True))
