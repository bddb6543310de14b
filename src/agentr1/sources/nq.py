"""NQ-open: questions of real users with every answer that annotators gave; no passages.

Layer 1. Reads the lines of `NQ-open.*.jsonl` and the columns of the Hub's `nq_open`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentr1.sources.base import Question, text_of, texts_of


def read(record: Mapping[str, Any], place: str) -> Question:
    """One record of NQ-open."""
    return Question(
        id="",
        question=text_of(record, "question", place),
        answers=texts_of(record, "answer", place),
        hops=1,
    )
