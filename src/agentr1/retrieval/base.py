"""What a retriever is: passages in, the best passages for a query out.

Layer 1. Two contracts: an `Index` blocks and takes many queries, which is what indexes are fast at;
a `Retriever` is asked for one query by each of many episodes at once. Search tools and environments
speak to a `Retriever` and never to one index; both know text and never tools, messages or tokens.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

LONG = 20_000
"""Characters from which a passage is called long: more than most contexts have room for, and than
any encoder sees."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")


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
    """Read a corpus into memory.

    Args:
        path: as for `read_passages`.

    Raises:
        ValueError: as `read_passages` does, or an id stands on two lines.
    """
    first: dict[str, int] = {}
    passages = []
    for number, passage in read_passages(path):
        if first.setdefault(passage.id, number) != number:
            raise ValueError(same_id(path, passage.id, (first[passage.id], number)))
        passages.append(passage)
    return passages


def read_passages(path: str | Path) -> Iterator[tuple[int, Passage]]:
    """Read a corpus as it is asked for: one JSON object with `id`, `title` and `text` a line.

    Args:
        path: a `.jsonl` or `.jsonl.gz` file of UTF-8 text. Empty lines and other fields are
            passed over.

    Yields:
        The number of the line, and its passage. That ids are unique is the caller's to check.

    Raises:
        ValueError: with file, line number, field and value.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"expected a corpus ending in .jsonl or .jsonl.gz, got {path.name!r}")
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as lines:  # decoded line by line, so that an error knows its line
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _passage(line, f"{path}, line {number}")
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read after line {number}: {error}; expected text compressed with "
            "gzip, all of it"
        ) from error


def same_id(path: str | Path, name: str, lines: tuple[int, int]) -> str:
    """What a reader says of an id that stands on two lines of a corpus."""
    return (
        f"{path}, line {lines[1]}: the id {name!r} is also on line {lines[0]}; ids tell passages "
        "apart, make them unique"
    )


def _passage(line: bytes, place: str) -> Passage:
    try:
        record: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: not UTF-8 at byte {error.start}: {line[error.start :][:12]!r}; save the "
            "corpus as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:  # too long a number and too deep a nesting too
        raise ValueError(
            f"{place}: expected one JSON object a line, got {line[:60]!r} ({error})"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected an object with id, title and text, got {line[:60]!r}")
    if type(record.get("id")) is int:
        record["id"] = str(record["id"])
    fields = [_text(record, name, place) for name in ("id", "title", "text")]
    if not fields[0].strip():
        raise ValueError(f"{place}: 'id' is empty, expected a text or a whole number")
    return Passage(*fields)


def _text(record: dict[str, Any], name: str, place: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: {name!r} must be a text, got {repr(value)[:60]} among the fields "
            f"{sorted(record)}"
        )
    if _SURROGATE.search(value):
        raise ValueError(
            f"{place}: {name!r} holds half of a surrogate pair, which is no character in UTF-8; "
            "remove it or put the whole character"
        )
    return value
