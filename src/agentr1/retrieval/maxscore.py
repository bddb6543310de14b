"""The best passages for some words without adding up what cannot change them.

Layer 1, used by `bm25.py`. A question is full of words that stand in half of all passages and are
worth next to nothing: MaxScore (Turtle and Flood, 1995) adds up the rare words first and looks the
frequent ones up only in passages that can still be among the best. Exact: places, order and scores
are those of the full sum, to the last bit. Knows postings, neither texts nor which formula
weighted them; weights must not be negative.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

_SLACK = 1e-5
"""Sums in another order differ by rounding; nothing closer than this share is ruled out."""
_SMALL = 50_000
"""Up to about so many passages and postings, a full sum is done before anything is ruled out."""
_LOOKUP = 16
"""A look-up costs about so many additions."""


class Postings:
    """What each word is worth in each passage that holds it.

    Args:
        weights: by word, then passage; float32, not negative.
        places: of the passages, ascending within a word.
        ends: word `w` has the postings from `ends[w]` to `ends[w + 1]`.
        passages: how many the corpus has.
    """

    def __init__(
        self, weights: np.ndarray, places: np.ndarray, ends: np.ndarray, passages: int
    ) -> None:
        # Plain views: slices of a mapped file's own kind of array cost more to make.
        self._weights, self._places = np.asarray(weights), np.asarray(places)
        self._ends = np.asarray(ends)
        self._passages = passages
        self._bounds: dict[int, float] = {}  # as asked for: reading all would read the whole index

    def best(self, words: Sequence[int], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Places and scores of the `k` best passages that hold any of the words.

        Args:
            words: those of a query; one that stands there twice counts twice.
            k: how many at most.

        Returns:
            Places, best first, the earlier one where scores are equal, and their scores (float32).
        """
        words = [word for word in words if self._count(word)]
        times = Counter(words)
        if not words or self._passages + sum(map(self._count, words)) // 2 < _SMALL:
            return self._best_of_all(words, k)
        rarest_first = sorted(times, key=self._count)
        bounds = [times[word] * self._bound(word) for word in rarest_first]
        # rest[i]: what a passage can gain by the words from the i-th on.
        rest = [*np.cumsum(bounds[::-1])[::-1].tolist(), 0.0]
        sums = np.zeros(self._passages, dtype=np.float32)
        candidates, done = self._add_up(sums, rarest_first, times, rest, k)
        for i in range(done, len(rarest_first)):
            word = rarest_first[i]
            if self._count(word) > _LOOKUP * len(candidates):
                sums[candidates] += times[word] * self._looked_up(word, candidates)
            else:
                self._add(sums, word, times[word])
            found = sums[candidates]
            candidates = candidates[found + rest[i + 1] * (1.0 + _SLACK) >= _kth(found, k)]
        return self._ranked(candidates, words, k)

    def _best_of_all(self, words: Sequence[int], k: int) -> tuple[np.ndarray, np.ndarray]:
        sums = np.zeros(self._passages, dtype=np.float32)
        for word in words:
            self._add(sums, word, 1)
        # Only what may be among the best is sorted.
        floor = _kth(sums, k)
        candidates = np.flatnonzero(sums >= floor if floor > 0.0 else sums > 0.0)
        order = np.argsort(-sums[candidates], kind="stable")[:k]
        return candidates[order], sums[candidates[order]]

    def _add_up(
        self,
        sums: np.ndarray,
        rarest_first: Sequence[int],
        times: Counter[int],
        rest: Sequence[float],
        k: int,
    ) -> tuple[np.ndarray, int]:
        """Sum whole words until no passage without any of them can be among the best.

        Returns:
            The passages that still can be, ascending, and how many words are in.
        """
        reached, done = 0.0, 0
        for done, word in enumerate(rarest_first, start=1):
            self._add(sums, word, times[word])
            last = done == len(rarest_first)
            possible = rest[done] < rest[0] - rest[done]
            # To find out costs as much as to add a word of some frequency.
            if last or (possible and self._count(rarest_first[done]) > self._passages // _LOOKUP):
                # The passages of one word are all different: their k-th best is reached by k.
                lists = [self._of(word)[1] for word in rarest_first[:done]]
                reached = max(_kth(sums[places], k) for places in lists)
                if rest[done] < reached:
                    break
        floor = reached - rest[done] * (1.0 + _SLACK)
        return np.flatnonzero(sums >= floor if floor > 0.0 else sums > 0.0), done

    def _add(self, sums: np.ndarray, word: int, times: int) -> None:
        weights, places = self._of(word)
        np.add.at(sums, places, times * weights if times > 1 else weights)

    def _looked_up(self, word: int, candidates: np.ndarray) -> np.ndarray:
        """What the word is worth in each of the passages, 0 where it does not stand."""
        weights, places = self._of(word)
        # Of one type: otherwise all places would be converted.
        at = np.searchsorted(places, candidates.astype(places.dtype))
        at = np.minimum(at, len(places) - 1)
        return np.where(places[at] == candidates, weights[at], np.float32(0.0))

    def _ranked(
        self, candidates: np.ndarray, words: Sequence[int], k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sum again, in the order of the query: so the scores are those of the full sum."""
        worth = {word: self._looked_up(word, candidates) for word in set(words)}
        scores = np.zeros(len(candidates), dtype=np.float32)
        for word in words:
            scores += worth[word]
        order = np.argsort(-scores, kind="stable")[:k]
        order = order[scores[order] > 0.0]
        return candidates[order], scores[order]

    def _of(self, word: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self._ends[word], self._ends[word + 1])
        return self._weights[part], self._places[part]

    def _count(self, word: int) -> int:
        return int(self._ends[word + 1]) - int(self._ends[word])

    def _bound(self, word: int) -> float:
        """The most that a word is worth anywhere."""
        bound = self._bounds.get(word)
        if bound is None:
            bound = self._bounds[word] = float(self._of(word)[0].max(initial=0.0))
        return bound


def _kth(sums: np.ndarray, k: int) -> float:
    """What the `k`-th best of these reaches in any case, 0 where they are fewer."""
    if len(sums) < k:
        return 0.0
    return float(np.partition(sums, len(sums) - k)[len(sums) - k]) * (1.0 - _SLACK)
