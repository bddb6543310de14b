"""The lexical index: what it finds, in which order, and what it refuses."""

from __future__ import annotations

import random
import subprocess
import sys

import bm25s
import numpy as np
import pytest

from agentr1.retrieval.base import Passage
from agentr1.retrieval.bm25 import Bm25Index, words_of
from retrieval.corpora import WORDS, random_passages, random_queries

PASSAGES = [
    Passage("a", "The Silver Lantern", "A novel of 1871 by Bora Tevi."),
    Passage("b", "Bora Tevi", "A writer born in Keldora, pupil of Lora Vene."),
    Passage("c", "Keldora", "A town in Ostria, ruled by Lora Vene."),
    Passage("d", "The Silver Harbour", "A play of 1820 by Lora Vene."),
]


def _found(index: Bm25Index, query: str, k: int) -> list[str]:
    return [hit.passage.id for hit in index.search([query], k)[0]]


def test_title_and_text_are_both_searched() -> None:
    index = Bm25Index(PASSAGES)
    assert _found(index, "the silver lantern", 1) == ["a"]
    assert _found(index, "Which town is in Ostria?", 1) == ["c"]


def test_case_and_punctuation_do_not_matter() -> None:
    index = Bm25Index(PASSAGES)
    assert _found(index, "SILVER, lantern!", 4) == _found(index, "silver lantern", 4)


def test_a_letter_is_one_however_it_is_encoded() -> None:
    passages = [Passage("a", "Beyonce\u0301", "ﬁnal Ｔｏｋｙｏ"), Passage("b", "Other", "thing")]
    index = Bm25Index(passages)
    for query in ("Beyoncé", "final", "tokyo"):
        assert _found(index, query, 2) == ["a"]


def test_only_passages_that_share_a_word_come_back() -> None:
    index = Bm25Index(PASSAGES)
    assert _found(index, "Keldora", 4) == ["c", "b"]


@pytest.mark.parametrize("query", ["", "   ", "?!", "zebra quagga"])
def test_a_query_without_known_words_finds_nothing(query: str) -> None:
    assert Bm25Index(PASSAGES).search([query], 3) == [[]]


def test_unknown_words_do_not_disturb_known_ones() -> None:
    index = Bm25Index(PASSAGES)
    assert _found(index, "zebra Keldora", 2) == _found(index, "Keldora", 2)


def test_ties_go_to_the_earlier_passage() -> None:
    twins = [Passage(str(n), f"Twin {n}", "the same words") for n in range(50)]
    for count in (1, 3, 49, 50, 60):
        expected = [str(n) for n in range(min(count, 50))]
        assert _found(Bm25Index(twins), "same words", count) == expected


def test_the_best_k_are_a_prefix_of_the_whole_ranking() -> None:
    rng = random.Random(0)
    words = [f"w{n}" for n in range(40)]
    corpus = [
        Passage(str(n), rng.choice(words), " ".join(rng.choices(words, k=rng.randint(3, 12))))
        for n in range(300)
    ]
    index = Bm25Index(corpus)
    for _ in range(20):
        query = " ".join(rng.choices(words, k=3))
        whole = _found(index, query, len(corpus))
        assert [_found(index, query, k) for k in (1, 2, 7)] == [whole[:k] for k in (1, 2, 7)]


def test_an_empty_corpus_and_a_useless_k_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one passage"):
        Bm25Index([])
    with pytest.raises(ValueError, match="k of at least 1, got 0"):
        Bm25Index(PASSAGES).search(["silver"], 0)


def test_a_score_comes_with_every_passage_and_falls_along_the_ranking() -> None:
    hits = Bm25Index(PASSAGES).search(["Keldora Lora"], 4)[0]
    assert [hit.passage.id for hit in hits] == ["c", "b", "d"]
    assert hits[0].score > hits[1].score > hits[2].score > 0


def test_the_ranking_is_that_of_the_full_sum_of_bm25s() -> None:
    passages = random_passages(3000)
    index = Bm25Index(passages)
    reference = bm25s.BM25(method="lucene")
    words = [words_of(f"{passage.title} {passage.text}") for passage in passages]
    reference.index(words, show_progress=False)
    for query in [*random_queries(60), "w1 w1 w2", " ".join(WORDS)]:
        scores = reference.get_scores_from_ids(reference.get_tokens_ids(words_of(query)))
        order = np.argsort(-scores, kind="stable")
        expected = [(place, scores[place]) for place in order.tolist() if scores[place] > 0]
        for k in (1, 4, 3000):
            assert index.rank([query], k)[0] == expected[:k]


def test_many_queries_are_answered_as_each_alone() -> None:
    index = Bm25Index(random_passages(300))
    queries = [*random_queries(30), "", "zebra"]
    assert index.search(queries, 5) == [index.search([query], 5)[0] for query in queries]
    assert index.search([], 5) == []


def test_the_index_imports_no_torch() -> None:
    program = "import agentr1.retrieval.bm25, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
