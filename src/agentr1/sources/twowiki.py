"""2WikiMultiHopQA: HotpotQA's shape with evidence triples, from two to four passages needed.

Layer 1. Reads the records of the official `train.json` and `dev.json` and of the parquet copy on
the Hub. Further answers, which the official scorer accepts, are in a file of their own in the
release, `id_aliases.json`; who reads that file puts them into a record as `answer_aliases`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentr1.sources.base import (
    Question,
    contexts_of,
    optional_text,
    supporting,
    text_of,
    texts_of,
    unique,
)

FOUR_HOPS = "bridge_comparison"


def read(record: Mapping[str, Any], place: str) -> Question:
    """One record of 2WikiMultiHopQA."""
    passages = contexts_of(record, place, glue=" ")
    titles, gold = supporting(record, passages, place)
    kind = optional_text(record, "type", place)
    answer = optional_text(record, "answer", place)
    return Question(
        id=text_of(record, "_id" if "_id" in record else "id", place),
        question=text_of(record, "question", place),
        answers=unique([answer, *texts_of(record, "answer_aliases", place)]) if answer else (),
        supporting_titles=titles,
        hops=4 if kind == FOUR_HOPS else 2,
        type=kind,
        passages=passages,
        gold=gold,
    )


def aliases_of(record: Mapping[str, Any], place: str) -> tuple[str, tuple[str, ...]]:
    """One record of `id_aliases.json`: the `answer_id` of questions, and what is accepted there."""
    names = (*texts_of(record, "aliases", place), *texts_of(record, "demonyms", place))
    return text_of(record, "Q_id", place), names
