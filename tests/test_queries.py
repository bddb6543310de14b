"""Queries of a demonstration are made of what has been seen, and of nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.queries import content_words, following_queries, mention

QUESTION = "What nationality is the founder of Point Foundation (Environment)?"
POINT = "Point Foundation (environment): It was founded by Stewart Brand."
BRAND = "Stewart Brand"


@pytest.mark.parametrize(
    ("title", "text", "found"),
    [
        ("Stewart Brand", "by Stewart Brand.", "Stewart Brand"),
        ("Stewart Brand", "by STEWART BRAND.", "STEWART BRAND"),  # as it stands there
        ("Justice League (film)", "the Justice League movie", "Justice League"),
        ("Justice League (film)", "a Justice League (film) x", "Justice League (film)"),
        ("Hayneville, Alabama", "capital: Hayneville", "Hayneville"),
        ("Ulm", "an Ulmer", None),
        ("It", "it rains", None),  # a short name needs its capitals
        ("It", "seen in It twice", "It"),
        ("A+ (C++)", "the A+ is", "A+"),
        ("(film)", "any", None),
    ],
)
def test_where_a_title_stands_in_a_text(title, text, found):
    place = mention(title, text)
    assert (place and place[1]) == found
    if place:
        assert text[place[0] :].startswith(place[1])


def queries(question=QUESTION, gold=(), others=(), missing=(BRAND,)):
    return list(following_queries(question, gold, others, missing))


def test_a_title_in_the_question_comes_first_in_the_questions_order():
    found = queries(
        "Who died first, Linda Hayes or Ada Byron?", missing=["Ada Byron", "Linda Hayes"]
    )
    assert [q for q in found if q in ("Ada Byron", "Linda Hayes")][:2] == [
        "Linda Hayes",
        "Ada Byron",
    ]
    assert found[0] == "Linda Hayes"
    assert found[1] == "Linda Hayes died first Ada Byron"


def test_then_one_in_a_supporting_passage_then_one_in_another():
    other = "Hippies: among them Ken Kesey."
    found = queries(gold=[POINT], others=[other], missing=["Ken Kesey", BRAND])
    assert [q for q in found if q in (BRAND, "Ken Kesey")] == [BRAND, "Ken Kesey"]


def test_a_name_that_shares_a_word_with_a_missing_title_is_tried():
    assert "King William II" in queries(
        gold=["Hague: There is the home of King William II, who reigned."],
        missing=["William II of the Netherlands"],
    )


def test_the_questions_words_are_what_is_left():
    assert queries(missing=["Nowhere"]) == [
        "nationality founder Point Foundation Environment",
    ]
    assert queries(gold=[POINT], missing=["Nowhere"]) == [
        "Point Foundation (environment) nationality founder",
        "nationality founder",
    ]


def test_content_words_keep_names_whole():
    assert content_words("Who is Jean-Luc O'Neill of the U.S. in 1990?") == [
        "Jean-Luc",
        "O'Neill",
        "U.S",
        "1990",
    ]


TEXT = st.lists(
    st.sampled_from(["Ada", "Ulm", "it", "It", "was", "born", "(film)", "of", "x,", "1990", "é."]),
    max_size=8,
).map(" ".join)


@given(TEXT, st.lists(TEXT, max_size=2), st.lists(TEXT, max_size=2), st.lists(TEXT, max_size=3))
def test_every_word_of_a_query_was_seen(question, gold, others, missing):
    gold, others = [f"A: {text}" for text in gold], [f"B: {text}" for text in others]
    seen = {word for text in (question, *gold, *others) for word in text.replace(":", "").split()}
    parts = seen | {part for word in seen for part in content_words(word)}
    parts |= {word.strip(".,()") for word in seen}
    for query in following_queries(question, gold, others, missing):
        assert {word.strip(".,()") for word in query.split()} <= parts | {""}
