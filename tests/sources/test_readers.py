"""Every data set's record, in the official shape and in the Hub's, gives the same question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

import question_sets as made
from agentr1.sources import bamboogle, gsm8k, hotpotqa, musique, nq, own, twowiki
from agentr1.sources.base import Context, Question, Reader

HOTPOT = Question(
    id="hp7",
    question="Which river runs through town 7?",
    answers=("River 7",),
    supporting_titles=("Town 7", "River 7"),
    hops=2,
    type="bridge",
    level="hard",
    passages=(
        Context("Rivers", "Rivers are wet. They run."),
        Context("River 7", "River 7 is long. It runs through town 7."),
        Context("Town 7", "Town 7 is small. It has a river."),
    ),
    gold=(2, 1),
)


def listed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The third shape: the Hub's newer lists of named pairs."""
    return dict(record) | {
        "supporting_facts": [{"title": t, "sent_id": n} for t, n in record["supporting_facts"]],
        "context": [{"title": t, "sentences": s} for t, s in record["context"]],
    }


@pytest.mark.parametrize(
    "record", [made.hotpotqa(7), made.hotpotqa_hub(7), listed(made.hotpotqa(7))]
)
def test_hotpotqa_is_one_question_in_all_its_shapes(record: Mapping[str, Any]) -> None:
    assert hotpotqa.read(record, "f, line 1") == HOTPOT


def test_a_gold_passage_that_is_not_there_keeps_its_title() -> None:
    record = made.hotpotqa(7)
    record["context"] = record["context"][:2]
    question = hotpotqa.read(record, "f")
    assert question.supporting_titles == ("Town 7", "River 7")
    assert question.gold == (1,)


def test_all_gold_is_there_only_with_every_title_and_every_text() -> None:
    record = made.hotpotqa(7)
    rivers, river, town = record["context"]
    for context, complete in (
        ([rivers, river, town], True),
        ([rivers, river], False),
        ([rivers, river, ["Town 7", [" "]]], False),
        ([["Rivers", []], river, town], True),
        ([], False),
    ):
        assert hotpotqa.read(record | {"context": context}, "f").has_all_gold is complete


def test_withheld_answers_are_no_answers() -> None:
    record = made.hotpotqa()
    del record["answer"], record["supporting_facts"]
    assert hotpotqa.read(record, "f").answers == ()
    assert hotpotqa.read(record | {"answer": ""}, "f").answers == ()


def test_twowiki_joins_sentences_and_counts_hops_by_kind() -> None:
    question = twowiki.read(made.twowiki(3), "f")
    assert question.passages[0] == Context("Film 3", "Film 3 is old. Director 3 made it.")
    assert (question.hops, question.gold) == (4, (0, 1))
    assert twowiki.read(made.twowiki(3, type="comparison"), "f").hops == 2
    assert twowiki.read(listed(made.twowiki(3)), "f") == question


def test_twowiki_accepts_the_aliases_of_its_answer() -> None:
    further = made.twowiki(answer="US", answer_aliases=["USA", "American", "US"])
    assert twowiki.read(further, "f").answers == ("US", "USA", "American")
    assert twowiki.read(further | {"answer": ""}, "f").answers == ()


def test_musique_lists_its_paragraphs_in_the_order_of_the_hops() -> None:
    question = musique.read(made.musique(4), "f")
    assert question.supporting_titles == ("A4", "B4")
    assert question.gold == (2, 1)
    assert (question.hops, question.type) == (2, "2hop")
    assert question.answers == ("end 4", "the end 4")
    assert question.answerable


def test_musique_without_its_steps_takes_the_marks_of_the_paragraphs() -> None:
    question = musique.read(made.musique(4, question_decomposition=[]), "f")
    assert question.gold == (1, 2)


def test_a_contrast_question_of_musique_is_not_answerable() -> None:
    lost = [{"id": 1, "paragraph_support_idx": 1}, {"id": 2, "paragraph_support_idx": 7}]
    question = musique.read(made.musique(answerable=False, question_decomposition=lost), "f")
    assert not question.answerable
    assert question.gold[0] == 1


def test_questions_without_passages_know_no_titles() -> None:
    for question in (
        bamboogle.read(made.bamboogle(1), "f"),
        nq.read(made.nq(1), "f"),
        gsm8k.read(made.gsm8k(1), "f"),
    ):
        assert (question.passages, question.supporting_titles, question.id) == ((), None, "")


def test_nq_has_all_answers_and_gsm8k_the_number_after_the_mark() -> None:
    assert nq.read(made.nq(2), "f").answers == ("Singer 2", "Band 2")
    question = gsm8k.read(made.gsm8k(2), "f")
    assert question.answers == ("1002",)
    assert question.more["solution"].endswith("1002.")
    plain = gsm8k.read({"id": "x", "question": "?", "answer": "7", "solution": "so"}, "f")
    assert (plain.id, plain.answers, plain.more) == ("x", ("7",), {"solution": "so"})


def test_rows_of_ours_keep_every_column() -> None:
    record = made.own(1, answers=[7, "seven"], extra={"a": 1}, prompt="dropped")
    question = own.read(record, "f")
    assert question.answers == ("7", "seven")
    assert question.more == {
        "hops": 2,
        "supporting_titles": ["T1"],
        "gold_ids": ["p1"],
        "extra": {"a": 1},
    }
    assert own.is_own(record)
    assert not any(
        own.is_own(shape())
        for shape in (
            made.hotpotqa,
            made.twowiki,
            made.musique,
            made.bamboogle,
            made.nq,
            made.gsm8k,
        )
    )


WRONG: dict[str, tuple[Reader, dict[str, Any], str]] = {
    "no question": (hotpotqa.read, made.hotpotqa(question=" "), "'question'"),
    "number as id": (hotpotqa.read, made.hotpotqa(_id=7), "'_id'"),
    "list as answer": (hotpotqa.read, made.hotpotqa(answer=["a"]), "'answer'"),
    "no context": (hotpotqa.read, made.hotpotqa(context=None), "'context'"),
    "text as sentences": (hotpotqa.read, made.hotpotqa(context=[["t", "s"]]), "'context'"),
    "facts without places": (
        hotpotqa.read,
        made.hotpotqa(supporting_facts=[["t"]]),
        "'supporting_facts'",
    ),
    "uneven columns": (
        hotpotqa.read,
        made.hotpotqa_hub() | {"context": {"title": ["a"], "sentences": []}},
        "'context'",
    ),
    "half a surrogate": (hotpotqa.read, made.hotpotqa(answer="\ud83d"), "surrogate"),
    "no paragraphs": (musique.read, made.hotpotqa() | {"id": "x"}, "'paragraphs'"),
    "text as a paragraph": (musique.read, made.musique(paragraphs=["x"]), "'paragraphs'"),
    "number as text": (
        musique.read,
        made.musique(paragraphs=[{"title": "t", "paragraph_text": 7}]),
        "'paragraph_text'",
    ),
    "list as number": (
        musique.read,
        made.musique(paragraphs=[{"idx": [1], "title": "t", "paragraph_text": "x"}]),
        "paragraph 0: 'idx' must be a whole number, or missing, got [1]",
    ),
    "list as support": (
        musique.read,
        made.musique(question_decomposition=[{"id": 1}, {"paragraph_support_idx": [1]}]),
        "step 1: 'paragraph_support_idx' must be a whole number, or missing, got [1]",
    ),
    "support that is not there": (
        musique.read,
        made.musique(question_decomposition=[{"id": 1, "paragraph_support_idx": 3}]),
        "step 0: 'paragraph_support_idx' must be the idx of one of the record's 3 paragraphs",
    ),
    "another sheet": (bamboogle.read, {"question": "x"}, "'Question'"),
    "text as answers": (nq.read, made.nq(answer="x"), "'answer'"),
    "no mark": (gsm8k.read, made.gsm8k(answer="first\nthen"), "####"),
    "truth as answer": (own.read, made.own(answers=[True]), "'answers'"),
    "half a surrogate of ours": (own.read, made.own(answers=["\ud83d"]), "surrogate"),
    "half a surrogate beside": (own.read, made.own(note=["\ud83d"]), "'note' holds half"),
    "text as hops": (own.read, made.own(hops="2"), "'hops'"),
    "text as gold": (own.read, made.own(gold_ids="p1"), "'gold_ids'"),
}


@pytest.mark.parametrize(("read", "record", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_field_is_named_with_its_place(
    read: Reader, record: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as raised:
        read(record, "file.json, line 3")
    assert str(raised.value).startswith("file.json, line 3")
    assert said in str(raised.value)
