"""Answers score as the official scorers of four data sets score them, on the cases that are hard.

Each scorer is written out here by hand, letter by letter, from what its script does: SQuAD's
`evaluate-v1.1.py`, HotpotQA's `hotpot_evaluate_v1.py`, 2WikiMultihopQA's `2wikimultihop_evaluate`
(whose v1.1 takes aliases) and MuSiQue's `metrics/answer.py`.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.rewards import exact_match, f1, normalize_answer

# What all four remove, and what counts as part of a word where an article is looked for.
ASCII_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
ARTICLES = ("a", "an", "the")


def slow_normal(text: str) -> str:
    """Lower case, punctuation out, articles out, spaces in order: the same in all four scripts."""
    kept = "".join(letter for letter in text.lower() if letter not in ASCII_PUNCTUATION)
    words, word = [], ""
    for letter in [*kept, " "]:
        if letter.isalnum() or letter == "_":
            word += letter
            continue
        # Between a word's letters and anything else there is a boundary, so an article goes even
        # where a sign that is no ASCII punctuation stands beside it.
        words.append(" " if word in ARTICLES else word)
        words.append(letter)
        word = ""
    return " ".join("".join(words).split())


def overlap(predicted: list[str], gold: list[str]) -> float:
    left, shared = list(gold), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


def squad(prediction: str, gold: str) -> tuple[float, float]:
    predicted, wanted = slow_normal(prediction), slow_normal(gold)
    return float(predicted == wanted), overlap(predicted.split(), wanted.split())


def hotpotqa(prediction: str, gold: str) -> tuple[float, float]:
    predicted, wanted = slow_normal(prediction), slow_normal(gold)
    if predicted != wanted and {predicted, wanted} & {"yes", "no", "noanswer"}:
        return 0.0, 0.0
    return squad(prediction, gold)


twowiki = hotpotqa  # adapted from it, and unchanged in this


def musique(prediction: str, gold: str) -> tuple[float, float]:
    predicted, wanted = slow_normal(prediction), slow_normal(gold)
    if not predicted or not wanted:
        return float(predicted == wanted), float(predicted == wanted)
    return squad(prediction, gold)


SCORERS = {"squad": squad, "hotpotqa": hotpotqa, "2wiki": twowiki, "musique": musique}

# prediction, gold, exact match in all four, F1 in HotpotQA and 2Wiki, F1 elsewhere if it differs.
CASES = [
    # Articles
    ("The Beatles", "Beatles", 1, 1.0, {}),
    ("a an the Beatles", "the Beatles", 1, 1.0, {}),
    ("Theatre", "the atre", 0, 0.0, {}),
    ("A", "The", 1, 0.0, {"musique": 1.0}),
    ("A", "B", 0, 0.0, {}),
    ("Vitamin A", "Vitamin", 1, 1.0, {}),
    ("L'A", "LA", 1, 1.0, {}),  # the apostrophe goes first, so no article is left
    # Punctuation
    ("St. Mary's", "St Marys", 1, 1.0, {}),
    ("U.S.", "US", 1, 1.0, {}),
    ("AC/DC", "ACDC", 1, 1.0, {}),
    ("AC/DC", "AC DC", 0, 0.0, {}),
    ("$5", "5", 1, 1.0, {}),
    ("...", "", 1, 0.0, {"musique": 1.0}),
    # Hyphens and dashes
    ("Jean-Luc Godard", "Jean Luc Godard", 0, 0.4, {}),
    ("Jean-Luc Godard", "JeanLuc Godard", 1, 1.0, {}),
    ("1914\N{EN DASH}1918", "1914-1918", 0, 0.0, {}),
    ("1914-1918", "19141918", 1, 1.0, {}),
    # Yes and no
    ("yes", "Yes.", 1, 1.0, {}),
    ("no", "yes", 0, 0.0, {}),
    ("yes, it is", "yes", 0, 0.0, {"squad": 0.5, "musique": 0.5}),
    ("no one", "no", 0, 0.0, {"squad": 2 / 3, "musique": 2 / 3}),
    ("no", "no one", 0, 0.0, {"squad": 2 / 3, "musique": 2 / 3}),
    ("noanswer", "no answer", 0, 0.0, {}),
    ("not yes", "yes indeed", 0, 0.5, {}),
    # Numbers
    ("1,000", "1000", 1, 1.0, {}),
    ("1.5", "15", 1, 1.0, {}),
    ("one thousand", "1000", 0, 0.0, {}),
    ("-3", "3", 1, 1.0, {}),
    ("May 5, 1990", "5 May 1990", 0, 1.0, {}),
    ("1990s", "1990", 0, 0.0, {}),
    # Unicode
    ("São Paulo", "SÃO PAULO", 1, 1.0, {}),
    ("São Paulo", "Sao Paulo", 0, 0.5, {}),
    ("Beyonce\N{COMBINING ACUTE ACCENT}", "Beyoncé", 0, 0.0, {}),
    ("Straße", "STRASSE", 0, 0.0, {}),
    ("İzmir", "izmir", 0, 0.0, {}),
    ("東京", "東京", 1, 1.0, {}),
    ("H₂O", "H2O", 0, 0.0, {}),
    ("New\N{NO-BREAK SPACE}York", "New York", 1, 1.0, {}),
    # Unicode punctuation is no punctuation
    ("St. Mary\N{RIGHT SINGLE QUOTATION MARK}s", "St. Mary's", 0, 0.5, {}),
    ("\N{LEFT DOUBLE QUOTATION MARK}Help\N{RIGHT DOUBLE QUOTATION MARK}", '"Help"', 0, 0.0, {}),
    ("the\N{RIGHT SINGLE QUOTATION MARK}s", "\N{RIGHT SINGLE QUOTATION MARK}s", 1, 1.0, {}),
    ("Who\N{HORIZONTAL ELLIPSIS}", "Who", 0, 0.0, {}),
    # Empty
    ("", "", 1, 0.0, {"musique": 1.0}),
    ("", "Paris", 0, 0.0, {}),
    ("   ", "the", 1, 0.0, {"musique": 1.0}),
    # Words in another number or order
    ("Paris Paris", "Paris", 0, 2 / 3, {}),
    ("Obama Barack", "Barack Obama", 0, 1.0, {}),
    ("Barack Obama", "Barack Hussein Obama", 0, 0.8, {}),
]


@pytest.mark.parametrize(("prediction", "gold", "exact", "f1_here", "others"), CASES)
def test_hard_cases_score_as_in_the_official_scripts(prediction, gold, exact, f1_here, others):
    assert exact_match(prediction, [gold]) == exact
    assert f1(prediction, [gold]) == pytest.approx(f1_here)
    for name, scorer in SCORERS.items():
        expected = (exact, others.get(name, f1_here))
        assert scorer(prediction, gold) == pytest.approx(expected), name


LETTERS = st.text(alphabet="aAtThHeEnNyYsSoO 0.,-_'’–éÉßİ\N{NO-BREAK SPACE}\n", max_size=16)


@given(LETTERS)
def test_normalisation_is_that_of_the_scripts(text):
    assert normalize_answer(text) == slow_normal(text)


@given(LETTERS, LETTERS)
def test_both_metrics_are_hotpotqa_s(prediction, gold):
    found = (exact_match(prediction, [gold]), f1(prediction, [gold]))
    assert found == pytest.approx(hotpotqa(prediction, gold))


@given(LETTERS, st.lists(LETTERS, min_size=1, max_size=4))
def test_with_aliases_the_best_of_them_counts(prediction, answers):
    each = [hotpotqa(prediction, answer) for answer in answers]
    assert exact_match(prediction, answers) == max(exact for exact, _ in each)
    assert f1(prediction, answers) == pytest.approx(max(score for _, score in each))
