"""What a retriever is: passages in, the best passages for a query out.

Layer 1. Two contracts: an `Index` blocks and takes many queries, which is what indexes are fast at;
a `Retriever` is asked for one query by each of many episodes at once. Search tools and environments
speak to a `Retriever` and never to one index; both know text and never tools, messages or tokens.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """One unit of text that a search can return.

    Attributes:
        id: unique within its corpus.
        title: what the passage is about.
        text: the passage itself.
    """

    id: str
    title: str
    text: str


class Hit(NamedTuple):
    """A passage found, and how well it matched: higher is better, comparable within one query."""

    passage: Passage
    score: float


class Index(Protocol):
    """Ranks the passages of one corpus for many queries at once; blocks, safe from any thread."""

    def __len__(self) -> int:
        """Passages in the corpus."""
        ...

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return per query at most `k` hits, best first, none where nothing matches."""
        ...


class Retriever(Protocol):
    """Finds passages for one query without blocking the event loop; many may wait at once."""

    async def find(self, query: str, k: int) -> list[Hit]:
        """Return at most `k` hits, best first, none where nothing matches."""
        ...


def load_passages(path: str | Path) -> list[Passage]:
    """Read a corpus: one JSON object with `id`, `title` and `text` a line.

    Args:
        path: a `.jsonl` or `.jsonl.gz` file.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"expected a corpus ending in .jsonl or .jsonl.gz, got {path.name!r}")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [
            _passage(line, f"{path}, line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]


def _passage(line: str, place: str) -> Passage:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: expected one JSON object a line, got {line[:60]!r}") from error
    if not isinstance(record, dict) or not {"id", "title", "text"} <= record.keys():
        raise ValueError(f"{place}: expected an object with id, title and text, got {line[:60]!r}")
    return Passage(id=str(record["id"]), title=str(record["title"]), text=str(record["text"]))
