"""GSM8K: word problems whose worked solution ends in a line `#### 42`; no passages.

Layer 1. Reads the lines of the official `train.jsonl` and `test.jsonl`, the columns of the Hub, and
lines that have the number alone in `answer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentr1.sources.base import Question, optional_text, text_of, unique, wrong

MARK = "####"


def read(record: Mapping[str, Any], place: str) -> Question:
    """One record of GSM8K; the solution goes along as a column."""
    given = optional_text(record, "answer", place) or ""
    solution, mark, answer = given.rpartition(MARK)
    if not mark and "\n" in given:
        raise wrong(record, "answer", place, f"a solution that ends in '{MARK} 42'")
    solution = solution.strip() or optional_text(record, "solution", place)
    return Question(
        id=optional_text(record, "id", place) or "",
        question=text_of(record, "question", place),
        answers=unique([answer.strip().replace(",", "")]),  # 1,000 and 1000 are one number
        more={"solution": solution} if solution else {},
    )
