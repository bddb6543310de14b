"""2WikiMultiHopQA: HotpotQA's shape with evidence triples, from two to four passages needed.

Layer 1. Reads the records of the official `train.json` and `dev.json` and of the parquet copy on
the Hub. The aliases of answers, which the release keeps in a file of its own, are not read:
published exact match is against the one answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentr1.sources.base import Question, contexts_of, optional_text, supporting, text_of, unique

FOUR_HOPS = "bridge_comparison"


def read(record: Mapping[str, Any], place: str) -> Question:
    """One record of 2WikiMultiHopQA."""
    passages = contexts_of(record, place, glue=" ")
    titles, gold = supporting(record, passages, place)
    kind = optional_text(record, "type", place)
    return Question(
        id=text_of(record, "_id" if "_id" in record else "id", place),
        question=text_of(record, "question", place),
        answers=unique([optional_text(record, "answer", place)]),
        supporting_titles=titles,
        hops=4 if kind == FOUR_HOPS else 2,
        type=kind,
        passages=passages,
        gold=gold,
    )
