"""Two rankings made one by reciprocal-rank fusion.

Layer 1. After Cormack, Clarke and Büttcher (SIGIR 2009): a passage is worth the sum of
1 / (60 + rank) over the rankings it stands in. Ranks alone count, so that scores of different kinds
need no scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from agentr1.retrieval.base import Hit, Passage

SMOOTHING = 60
"""The paper's k."""
DEPTH = 100
"""Ranks of each index that are looked at, or k where that is more."""


class Ranker(Protocol):
    """An index that can tell the places of what it finds: BM25 and dense ones."""

    passages: Sequence[Passage]

    def rank(self, queries: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """Return per query at most `k` places in the corpus with their scores, best first."""
        ...


class HybridIndex:
    """A search that asks two indexes over the same passages.

    Args:
        first: an index.
        second: another one; its passages are the first one's.
    """

    def __init__(self, first: Ranker, second: Ranker) -> None:
        if first.passages is not second.passages:
            raise ValueError(
                f"expected two indexes over the same passages, got one over {len(first.passages)} "
                f"and one over {len(second.passages)} others: build both from one corpus"
            )
        self.passages = first.passages
        self._rankers = (first, second)

    def __len__(self) -> int:
        return len(self.passages)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return per query at most `k` hits, best first; ties go to the earlier passage."""
        return [
            [Hit(self.passages[place], score) for place, score in ranking]
            for ranking in self.rank(queries, k)
        ]

    def rank(self, queries: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """Return per query the places in the corpus that `search` finds, with their scores."""
        if k < 1:
            raise ValueError(f"expected k of at least 1, got {k}")
        found = [ranker.rank(queries, max(k, DEPTH)) for ranker in self._rankers]
        return [fuse(rankings)[:k] for rankings in zip(*found, strict=True)]


def fuse(rankings: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Fuse the rankings of one query; their own scores are not looked at."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, (place, _) in enumerate(ranking, start=1):
            scores[place] = scores.get(place, 0.0) + 1 / (SMOOTHING + rank)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
