"""MuSiQue: twenty paragraphs, and the single-hop questions that the question is made of.

Layer 1. Reads the lines of `musique_ans_v1.0_*.jsonl` and `musique_full_v1.0_*.jsonl`. The latter
hold contrast questions whose paragraphs lack the answer; they come out as not answerable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentr1.sources.base import (
    Context,
    Question,
    list_of,
    optional_number,
    optional_text,
    text_of,
    texts_of,
    unique,
    wrong,
)


def read(record: Mapping[str, Any], place: str) -> Question:
    """One record of MuSiQue."""
    identity = text_of(record, "id", place)
    paragraphs = list_of(record, "paragraphs", place)
    steps = list_of(record, "question_decomposition", place) if "answer" in record else ()
    if not all(isinstance(entry, Mapping) for entry in (*paragraphs, *steps)):
        raise wrong(record, "paragraphs", place, "a list of objects, as question_decomposition")
    passages = tuple(
        Context(
            optional_text(paragraph, "title", f"{place}, paragraph {i}") or "",
            optional_text(paragraph, "paragraph_text", f"{place}, paragraph {i}") or "",
        )
        for i, paragraph in enumerate(paragraphs)
    )
    answerable = record.get("answerable") is not False
    gold = _in_order_of_hops(paragraphs, steps, answerable, place)
    answer = optional_text(record, "answer", place)
    return Question(
        id=identity,
        question=text_of(record, "question", place),
        answers=unique([answer, *texts_of(record, "answer_aliases", place)]) if answer else (),
        supporting_titles=unique(passages[i].title for i in gold),
        hops=len(steps) or None,
        type=identity.partition("__")[0],
        passages=passages,
        gold=gold,
        answerable=answerable,
    )


def _in_order_of_hops(
    paragraphs: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    answerable: bool,
    place: str,
) -> tuple[int, ...]:
    """Where the supporting paragraphs are, the one for the first hop first.

    A contrast question has lost supporting paragraphs; every other question names some it has.
    """
    places: dict[int | None, int] = {}
    for i, paragraph in enumerate(paragraphs):
        number = optional_number(paragraph, "idx", f"{place}, paragraph {i}")
        places[i if number is None else number] = i
    keys = [
        optional_number(step, "paragraph_support_idx", f"{place}, step {i}")
        for i, step in enumerate(steps)
    ]
    named = [places[key] for key in keys if key in places]
    for i, key in enumerate(keys):
        if answerable and key is not None and key not in places:
            expected = f"the idx of one of the record's {len(places)} paragraphs"
            raise wrong(steps[i], "paragraph_support_idx", f"{place}, step {i}", expected)
    marked = [i for i, paragraph in enumerate(paragraphs) if paragraph.get("is_supporting") is True]
    return tuple(dict.fromkeys([*named, *marked]))
