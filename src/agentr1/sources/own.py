"""This project's own rows, of any data set: `question` and `answers`, and passages by their ids.

Layer 1. Every column is kept, so that what was written once can be sampled or mixed again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agentr1.sources.base import (
    Question,
    list_of,
    optional_number,
    optional_text,
    text_of,
    texts_of,
    whole,
    wrong,
)

_COLUMNS = ("id", "question", "answers", "answer", "prompt")


def is_own(record: Mapping[str, Any]) -> bool:
    """Whether a record is a row already: none of the official shapes has `answers`."""
    return "answers" in record


def read(record: Mapping[str, Any], place: str) -> Question:
    """One row of ours."""
    answers = list_of(record, "answers", place)
    if not all(type(answer) in (str, int, float) for answer in answers):
        raise wrong(record, "answers", place, "a list of texts or numbers")
    optional_number(record, "hops", place)
    for name in ("supporting_titles", "gold_ids"):
        texts_of(record, name, place)
    for name in ("type", "level"):
        optional_text(record, name, place)
    # A row that names no source is of the data set it is read for.
    dropped = _COLUMNS if optional_text(record, "source", place) else (*_COLUMNS, "source")
    more = {name: value for name, value in record.items() if name not in dropped}
    for name, value in more.items():
        whole(json.dumps(value, ensure_ascii=False, default=repr), name, place)
    return Question(
        id=optional_text(record, "id", place) or "",
        question=text_of(record, "question", place),
        answers=texts_of({"answers": [str(answer) for answer in answers]}, "answers", place),
        more=more,
    )
