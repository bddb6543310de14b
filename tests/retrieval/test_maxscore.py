"""What is left out of a sum never changes which passages are best, their order or their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.retrieval import maxscore
from agentr1.retrieval.maxscore import Postings

WEIGHTS = np.array([0.1, 0.3, 0.7, 1.1, 2.9, 7.7], dtype=np.float32)  # few, so that sums tie


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maxscore, "_SMALL", 0)


def made(words: Sequence[Sequence[tuple[int, float]]], passages: int) -> Postings:
    """From the places and weights of each word."""
    flat = [posting for word in words for posting in sorted(word)]
    places = np.array([place for place, _ in flat], dtype=np.int32)
    weights = np.array([weight for _, weight in flat], dtype=np.float32)
    ends = np.cumsum([0, *map(len, words)])
    return Postings(weights, places, ends, passages)


def full_sum(
    words: Sequence[Sequence[tuple[int, float]]], passages: int, query: Sequence[int], k: int
) -> tuple[list[int], list[float]]:
    """All of it, word by word in the order of the query, in the precision of the weights."""
    sums = np.zeros(passages, dtype=np.float32)
    for word in query:
        for place, weight in words[word]:
            sums[place] += np.float32(weight)
    order = [int(i) for i in np.argsort(-sums, kind="stable") if sums[i] > 0][:k]
    return order, [float(sums[i]) for i in order]


@given(data=st.data(), passages=st.integers(1, 60), k=st.integers(1, 12))
def test_it_is_the_full_sum_to_the_last_bit(data: st.DataObject, passages: int, k: int) -> None:
    one = st.dictionaries(
        st.integers(0, passages - 1), st.sampled_from(WEIGHTS.tolist()), max_size=passages
    )
    words = [sorted(word.items()) for word in data.draw(st.lists(one, min_size=1, max_size=8))]
    query = data.draw(st.lists(st.integers(0, len(words) - 1), min_size=1, max_size=12))
    places, scores = made(words, passages).best(query, k)
    assert (places.tolist(), scores.tolist()) == full_sum(words, passages, query, k)
    assert scores.dtype == np.float32


def natural(passages: int, seed: int) -> list[list[tuple[int, float]]]:
    """Words from frequent and cheap to rare and dear, as in a text."""
    random = np.random.default_rng(seed)
    words = []
    for share in (0.9, 0.8, 0.5, 0.3, 0.1, 0.03, 0.01, 0.004, 0.002):
        places = np.flatnonzero(random.random(passages) < share)
        weights = -np.log(share) * random.uniform(0.3, 1.0, len(places))
        words.append(list(zip(places.tolist(), weights.astype(np.float32).tolist(), strict=True)))
    return words


@pytest.mark.parametrize("seed", range(5))
def test_for_natural_words_frequent_ones_are_only_looked_up(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = 4000
    words = natural(passages, seed)
    postings = made(words, passages)
    added = []
    add = Postings._add
    monkeypatch.setattr(
        Postings,
        "_add",
        lambda self, sums, word, times: (added.append(word), add(self, sums, word, times)),
    )
    query = [0, 7, 1, 2, 8, 0, 3, 6]
    places, scores = postings.best(query, 3)
    assert (places.tolist(), scores.tolist()) == full_sum(words, passages, query, 3)
    assert 0 not in added
    assert 1 not in added


def test_a_passage_with_none_of_the_rare_words_can_be_among_the_best() -> None:
    rare = [(0, 5.0), (1, 1.0)]
    frequent = [(place, 1.9 if place == 40 else 0.5) for place in range(10, 50)]
    places, scores = made([rare, frequent], 64).best([0, 1], 2)
    assert places.tolist() == [0, 40]
    assert scores.tolist() == [5.0, float(np.float32(1.9))]


@pytest.mark.parametrize("small", [0, 10**9])
def test_both_ways_agree_with_bm25s(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import bm25s

    monkeypatch.setattr(maxscore, "_SMALL", small)
    text = Path(__file__).read_text(encoding="utf-8")
    corpus = [line.split() or ["-"] for line in text.splitlines()]
    engine = bm25s.BM25(method="lucene", backend="numpy")
    engine.index(corpus, show_progress=False)
    numbers = engine.scores
    postings = Postings(
        *(numbers[name] for name in ("data", "indices", "indptr")), passages=len(corpus)
    )
    for line in corpus:
        ids = engine.get_tokens_ids(line)
        expected = engine.get_scores_from_ids(ids)
        places, scores = postings.best(ids, 5)
        assert places.tolist() == np.argsort(-expected, kind="stable")[: len(places)].tolist()
        assert scores.tolist() == expected[places].tolist()


def test_words_that_no_passage_holds_find_nothing() -> None:
    places, scores = made([[], [(0, 1.0)]], 3).best([0], 2)
    assert (len(places), len(scores)) == (0, 0)
