"""The corpus ceiling, printed beside every score: no agent can read what is not there.

Layer 6, between `retrieval.quality`, which knows passages and answers, and the report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from agentr1.retrieval.base import Passage, read_passages
from agentr1.retrieval.manifest import NAME as MANIFEST
from agentr1.retrieval.passages import TEXTS, StoredPassages
from agentr1.retrieval.quality import answers_in, coverage
from agentr1.retrieval.remote import is_address
from agentr1.tools.search import shortened
from agentr1.types import Row

MOST_BYTES = 1 << 30
"""Larger corpora take minutes to read and are left to `agentr1 index`."""


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """Which questions a system can answer from the corpus.

    Attributes:
        covered: by row id, whether an accepted answer stands in the corpus or is yes or no; None:
            not known.
        note: what was looked at, or why it is not known.
    """

    covered: Mapping[str, bool] | None
    note: str

    @property
    def share(self) -> float | None:
        """Of all questions."""
        return sum(self.covered.values()) / len(self.covered) if self.covered else None


def ceiling_of(
    place: Path | str | None, rows: Sequence[Row], passage_chars: int | None = None
) -> Ceiling:
    """Look for every row's answers in a corpus.

    Args:
        place: passages file, index folder or address; None where there is no search.
        rows: with `id` and, to be looked for, `answers`.
        passage_chars: where the search tool cuts a passage; what lies behind it cannot be read.
    """
    if place is None:
        return Ceiling(None, "not known, there is no search tool over a corpus")
    if is_address(place):
        return Ceiling(None, f"not known, the passages are behind {place}")
    if not all(row.get("answers") for row in rows):
        return Ceiling(None, "not known, there are rows without answers")
    path = Path(place)
    stored = (path / MANIFEST).is_file()
    size = (path / TEXTS if stored else path).stat().st_size
    if size > MOST_BYTES:
        return Ceiling(
            None, f"not looked for, {path} has {size >> 20} MB; `agentr1 index` reports it"
        )
    passages: Iterable[Passage] = (
        StoredPassages(path) if stored else (passage for _, passage in read_passages(path))
    )
    shown = (
        dataclasses.replace(passage, text=shortened(passage.text, passage_chars))
        for passage in passages
    )
    found = answers_in(shown, rows)
    covered = {str(row["id"]): coverage([row], found).ceiling > 0 for row in rows}
    closed = coverage(rows, found).closed
    guessed = f", or it is yes or no ({closed} questions)" if closed else ""
    cut = f", cut at {passage_chars} characters as it is shown" if passage_chars else ""
    note = f"an accepted answer stands in some passage of the corpus{cut}{guessed}"
    return Ceiling(covered, note)
