"""Reciprocal-rank fusion, against numbers computed by hand."""

from __future__ import annotations

import pytest

from agentr1.retrieval.bm25 import Bm25Index
from agentr1.retrieval.hybrid import DEPTH, HybridIndex, fuse
from retrieval.corpora import random_passages

PASSAGES = random_passages(300)


class Fixed:
    """Ranks the passages in a given order, whatever is asked."""

    def __init__(self, places):
        self.passages = PASSAGES
        self.places = places
        self.depths = []

    def rank(self, queries, k):
        self.depths.append(k)
        return [[(place, 0.5) for place in self.places[:k]] for _ in queries]


def test_a_passage_is_worth_the_sum_of_its_reciprocal_ranks() -> None:
    fused = fuse([[(7, 9.0), (3, 8.0), (5, 1.0)], [(3, 0.1), (9, 0.0)]])
    expected = {3: 1 / 62 + 1 / 61, 7: 1 / 61, 9: 1 / 62, 5: 1 / 63}
    assert [place for place, _ in fused] == [3, 7, 9, 5]
    assert dict(fused) == pytest.approx(expected)


def test_ties_go_to_the_earlier_passage_whichever_index_found_it() -> None:
    assert [place for place, _ in fuse([[(8, 1.0), (2, 1.0)], [(4, 1.0), (1, 1.0)]])] == [
        4,
        8,
        1,
        2,
    ]
    assert fuse([[(8, 1.0)], [(4, 1.0)]]) == fuse([[(4, 1.0)], [(8, 1.0)]])


def test_both_indexes_are_asked_deep_and_k_are_returned() -> None:
    first, second = Fixed(range(250)), Fixed(range(249, -1, -1))
    index = HybridIndex(first, second)
    assert len(index) == 300
    hits = index.search(["a", "b"], 3)
    assert [len(of_query) for of_query in hits] == [3, 3]
    assert hits[0][0].passage is PASSAGES[0]
    index.search(["a"], DEPTH + 50)
    assert first.depths == second.depths == [DEPTH, DEPTH + 50]


def test_what_cannot_be_fused_is_refused() -> None:
    with pytest.raises(ValueError, match="two indexes over the same passages"):
        HybridIndex(Bm25Index(PASSAGES), Bm25Index(PASSAGES[:5]))
    with pytest.raises(ValueError, match="k of at least 1, got 0"):
        HybridIndex(Fixed([1]), Fixed([1])).search(["a"], 0)
