"""Recall and answer coverage, against numbers counted by hand and against a search word by word."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.retrieval.base import Passage
from agentr1.retrieval.bm25 import Bm25Index
from agentr1.retrieval.quality import answers_in, coverage, has_support, is_covered, recall, summary
from agentr1.rewards import normalize_answer

PASSAGES = [
    Passage("a", "Bora Tevi", "A writer born in the town of Keldora."),
    Passage("b", "Keldora", 'A town in Ostria, ruled by "Lora" Vene since 1,871.'),
    Passage("c", "Lora Vene", "A judge; she knows U.S. law."),
    Passage("d", "Keldora", "Another one."),
]


def _row(question: str, *answers: str, **columns: Any) -> dict[str, Any]:
    return {"id": question, "question": question, "answers": list(answers), **columns}


def test_recall_counts_supporting_passages_among_the_first_k() -> None:
    rows = [
        _row("Bora Tevi", "x", gold_ids=["a", "c"]),  # finds a alone
        _row("Keldora Ostria", "x", gold_ids=["b"]),  # finds b first
        _row("town", "x", gold_ids=["a", "b"]),  # finds both, one after the other
        _row("not counted", "x", gold_ids=[]),
    ]
    measured = recall(Bm25Index(PASSAGES), rows, [1, 2])
    assert measured.questions == 3
    assert measured.found == pytest.approx({1: (0.5 + 1 + 0.5) / 3, 2: (0.5 + 1 + 1) / 3})
    assert measured.all_found == pytest.approx({1: 1 / 3, 2: 2 / 3})


def test_titles_stand_in_for_ids_and_one_passage_of_a_title_is_enough() -> None:
    rows = [_row("ruled by Lora Vene", "x", supporting_titles=["Keldora", "Lora Vene", "Keldora"])]
    measured = recall(Bm25Index(PASSAGES), rows, [1, 2, 4])
    assert measured.found == {1: 0.5, 2: 1.0, 4: 1.0}


def test_many_batches_are_as_good_as_one() -> None:
    rows = [_row("town", "x", gold_ids=["a", "b"])] * 150
    assert recall(Bm25Index(PASSAGES), rows, [1]).found == {1: 0.5}


def test_there_must_be_something_to_measure() -> None:
    assert not has_support([_row("town", "x"), _row("town", "x", gold_ids=[])])
    with pytest.raises(ValueError, match="no row has `gold_ids` or `supporting_titles`"):
        recall(Bm25Index(PASSAGES), [_row("town", "x")], [1])
    with pytest.raises(ValueError, match=r"k of at least 1, got \[0, 3\]"):
        recall(Bm25Index(PASSAGES), [_row("town", "x", gold_ids=["a"])], [0, 3])
    with pytest.raises(ValueError, match="at least one question"):
        coverage([], frozenset())
    with pytest.raises(ValueError, match="'answers'|answers=None"):
        coverage([{"id": "q", "question": "?"}], frozenset())


@pytest.mark.parametrize(
    ("answer", "there"),
    [
        ("Bora Tevi", True),  # a title
        ("town of Keldora", True),
        ("the TOWN, of Keldora!", True),  # as the metrics compare
        ("1871", True),
        ("Lora Vene", True),
        ("US law", True),
        ("no", False),  # "knows" holds no such word, and yes and no are not looked for
        ("know", False),
        ("Keldora Ostria", False),  # not in a row
        ("Bora Tevi Keldora", False),
        ("town of Keldoras", False),
        ("town of Keldo", False),
    ],
)
def test_an_answer_stands_in_the_corpus_as_whole_words_in_a_row(answer: str, there: bool) -> None:
    found = answers_in(PASSAGES, [_row("q", answer)])
    assert found == ({normalize_answer(answer)} if there else set())


def test_yes_and_no_are_counted_apart() -> None:
    rows = [
        _row("1", "Keldora"),
        _row("2", "nowhere", "Ostria"),
        _row("3", "nowhere"),
        _row("4", "Yes."),
        _row("5", "no"),
        _row("6", "no", "nowhere"),
    ]
    found = answers_in(PASSAGES, rows)
    assert [is_covered(row, found) for row in rows] == [True, True, False, None, None, False]
    counted = coverage(rows, found)
    assert counted == (6, 2, 2)
    assert counted.share == 0.5
    assert counted.ceiling == pytest.approx(4 / 6)
    assert math.isnan(coverage(rows[3:5], found).share)
    assert summary(None, counted) == {
        "questions": 6,
        "answer_coverage": 0.5,
        "yes_no": 2,
        "ceiling": pytest.approx(4 / 6),
    }


@given(seed=st.integers(0, 10_000))
def test_one_pass_finds_what_a_search_for_each_answer_finds(seed: int) -> None:
    rng = random.Random(seed)
    words = ["a", "be", "ce", "de", "The", "e-f"]

    def text(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(0, most)))

    passages = [Passage(str(n), text(2), text(9)) for n in range(6)]
    answers = [text(4) for _ in range(12)]
    expected = {
        plain
        for plain in map(normalize_answer, answers)
        if plain
        and any(f" {plain} " in f" {normalize_answer(f'{p.title} {p.text}')} " for p in passages)
    }
    assert answers_in(iter(passages), [_row("q", *answers)]) == expected
