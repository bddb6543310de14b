"""HotpotQA: ten passages of sentences, two of which are needed.

Layer 1. Reads the records of `hotpot_train_v1.1.json` and its like, and the columns of the Hub's
`hotpotqa/hotpot_qa`, which are the same under other shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentr1.sources.base import Question, contexts_of, optional_text, supporting, text_of, unique


def read(record: Mapping[str, Any], place: str) -> Question:
    """One record of HotpotQA."""
    # From the second on, a sentence begins with the space that parts it from the one before.
    passages = contexts_of(record, place, glue="")
    titles, gold = supporting(record, passages, place)
    return Question(
        id=text_of(record, "_id" if "_id" in record else "id", place),
        question=text_of(record, "question", place),
        answers=unique([optional_text(record, "answer", place)]),
        supporting_titles=titles,
        hops=2,
        type=optional_text(record, "type", place),
        level=optional_text(record, "level", place),
        passages=passages,
        gold=gold,
    )
