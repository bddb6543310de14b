"""Bamboogle: 125 two-hop questions that a search engine's first answer gets wrong; no passages.

Layer 1. Reads the rows of the official sheet saved as CSV, and of the copy on the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentr1.sources.base import Question, optional_text, text_of, unique


def read(record: Mapping[str, Any], place: str) -> Question:
    """One row of Bamboogle."""
    return Question(
        id="",
        question=text_of(record, "Question", place),
        answers=unique([optional_text(record, "Answer", place)]),
        hops=2,
    )
