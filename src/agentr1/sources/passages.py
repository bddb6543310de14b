"""Passages of many questions written once each: their ids, and a set of them that stays small.

Layer 1. Ten questions share a passage and a corpus has millions, so what is remembered of one is a
number of eight bytes, for which a set takes up to 24. Two different passages of five million are
taken for one with a probability below one in a million, and then one of them is left out.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentr1.retrieval.base import LONG
from agentr1.sources.base import Context, optional_text, text_of
from agentr1.sources.lines import LineFile
from agentr1.sources.records import read_records


def digest(*texts: str) -> int:
    """64 bits of a hash of texts."""
    return int.from_bytes(_hash(texts), "big")


def passage_id(title: str, text: str) -> str:
    """The id of a passage that has none: the same on every machine and in every data set."""
    return _hash((title, text)).hex()


class Digests:
    """A set of 64-bit numbers in 12 to 24 bytes each, where Python's takes a hundred.

    Open addressing with linear probing; the numbers are hashes already. 0 marks a free place, so 0
    itself is kept as 1.
    """

    def __init__(self) -> None:
        self._places = array("Q", [0]) * 1024
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, number: int) -> bool:
        return self._places[self._find(number or 1)] != 0

    def add(self, number: int) -> bool:
        """Add a number; False if it was there."""
        number = number or 1
        at = self._find(number)
        if self._places[at]:
            return False
        self._places[at] = number
        self._count += 1
        if 3 * self._count > 2 * len(self._places):
            self._grow()
        return True

    def _find(self, number: int) -> int:
        """Where a number is, or else the free place where it belongs."""
        places, mask = self._places, len(self._places) - 1
        at = number & mask
        while (found := places[at]) and found != number:
            at = (at + 1) & mask
        return at

    def _grow(self) -> None:
        old = self._places
        self._places = array("Q", [0]) * (2 * len(old))
        for number in old:
            if number:
                self._places[self._find(number)] = number


class PassageFile(LineFile):
    """A corpus being written: `{"id", "title", "text"}` a line, no passage twice.

    Attributes:
        repeated: passages left out because they are there already.
        empty: passages left out because they have no text.
        long: of at least `LONG` characters; kept whole, since a cut could take the answer away.
        longest: characters of the longest.
        characters: of all titles and texts.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.repeated = self.empty = self.long = self.longest = self.characters = 0
        self._ids = Digests()
        self._contents = Digests()

    def __contains__(self, identity: str) -> bool:
        return digest(identity) in self._ids

    def add(self, passage: Context) -> str | None:
        """Write a passage unless it is there; its id, or None if it is empty."""
        if not passage.text:
            self.empty += 1
            return None
        identity = passage_id(passage.title, passage.text)
        if self._ids.add(digest(identity)):
            self._write(identity, passage.title, passage.text)
        else:
            self.repeated += 1
        return identity

    def add_file(self, path: Path) -> None:
        """Write the passages of a corpus with the ids they have.

        Raises:
            ValueError: it holds none, a line lacks a field, or an id stands for two passages.
        """
        before = len(self) + self.repeated + self.empty
        for place, record in read_records(path):
            self._add_own(record, place)
        if before == len(self) + self.repeated + self.empty:
            raise ValueError(
                f"{path} holds no passages, expected one JSON object with id, title and text a line"
            )

    def _add_own(self, record: Mapping[str, Any], place: str) -> None:
        identity = text_of(record, "id", place)
        title = optional_text(record, "title", place) or ""
        text = optional_text(record, "text", place)
        named = identity in self and identity == passage_id(title, text or "")  # says what it holds
        if not text:
            self.empty += 1
        elif named or not self._contents.add(digest(identity, title, text)):
            self.repeated += 1
        elif not self._ids.add(digest(identity)):
            raise ValueError(
                f"{place}: id {identity!r} is that of an earlier passage with another title or "
                "text; rows name passages by id, make them unique"
            )
        else:
            self._write(identity, title, text)

    def _write(self, identity: str, title: str, text: str) -> None:
        self.write({"id": identity, "title": title, "text": text})
        self.long += len(text) >= LONG
        self.longest = max(self.longest, len(text))
        self.characters += len(title) + len(text)


def _hash(texts: tuple[str, ...]) -> bytes:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
