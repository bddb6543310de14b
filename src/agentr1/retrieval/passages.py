"""The passages of an index folder: on disk, read through memory mapping one by one.

Layer 1. Millions of passages would be gigabytes of Python objects; here a passage exists while it
is looked at, and what is read often stays in the system's own cache. Knows nothing of ranking.
"""

from __future__ import annotations

import array
import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from tqdm.auto import tqdm

from agentr1.retrieval.base import LONG, Passage, read_passages, same_id

TEXTS = "passages.jsonl"
ENDS = "passages.ends.i64"


class Stored(NamedTuple):
    """What was written by `store`.

    Attributes:
        passages: how many.
        long: how many have at least `LONG` characters of text.
        longest: characters of the longest text.
    """

    passages: int
    long: int
    longest: int


class StoredPassages(Sequence[Passage]):
    """The passages of an index folder, by their place in the corpus; safe from any thread.

    Args:
        folder: holds what `store` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self._ends = np.memmap(folder / ENDS, dtype=np.int64, mode="r")
        with (folder / TEXTS).open("rb") as file:
            self._texts = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> Passage: ...
    @overload
    def __getitem__(self, place: slice) -> list[Passage]: ...
    def __getitem__(self, place: int | slice) -> Passage | list[Passage]:
        """Read one passage, or those of a slice."""
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"there is no passage {place}, the corpus has {len(self)}")
        place %= len(self)
        start = int(self._ends[place - 1]) if place else 0
        return Passage(*json.loads(self._texts[start : int(self._ends[place])]))

    def __iter__(self) -> Iterator[Passage]:
        return (self[place] for place in range(len(self)))


def store(corpus: Path, folder: Path) -> Stored:
    """Copy a corpus into an index folder.

    Args:
        corpus: as for `read_passages`.
        folder: must exist.

    Raises:
        ValueError: as `read_passages` does, or the corpus is empty, or an id stands on two lines.
    """
    hashes = array.array("Q")
    count = long = longest = end = 0
    with (folder / TEXTS).open("wb") as texts, (folder / ENDS).open("wb") as ends:
        bar = tqdm(read_passages(corpus), desc="passages", unit="passage", mininterval=1)
        for _, passage in bar:
            line = line_of(passage)
            texts.write(line)
            end += len(line)
            ends.write(end.to_bytes(8, "little"))
            hashes.append(_hash(passage.id))
            count += 1
            long += len(passage.text) >= LONG
            longest = max(longest, len(passage.text))
    if not count:
        raise ValueError(f"{corpus} holds no passages, expected one JSON object a line")
    _refuse_same_ids(corpus, np.frombuffer(hashes, dtype=np.uint64))
    return Stored(count, long, longest)


def line_of(passage: Passage) -> bytes:
    """A passage as it is written."""
    record = (passage.id, passage.title, passage.text)
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _refuse_same_ids(corpus: Path, hashes: np.ndarray) -> None:
    """Look again, and only then at ids themselves, where hashes of ids are equal.

    A set of five million ids would take more memory than the whole rest of this module.
    """
    ordered = np.sort(hashes)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not suspects:
        return
    first: dict[str, int] = {}
    for number, passage in read_passages(corpus):
        name = passage.id
        if _hash(name) in suspects and first.setdefault(name, number) != number:
            raise ValueError(same_id(corpus, name, (first[name], number)))
