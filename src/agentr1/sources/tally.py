"""One split being written: its rows, what was left out of it, and the counts of its card.

Layer 1. Decides nothing: who calls it says why a question is left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentr1.sources.lines import LineFile

COUNTED = ("type", "hops", "level")


class RowFile(LineFile):
    """The rows of one split, and per data set what became of the questions read.

    Attributes:
        read: questions seen, by data set.
        left_out: questions seen and not written, by data set and reason.
        written: rows, by data set.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.read: Counter[str] = Counter()
        self.left_out: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.written: Counter[str] = Counter()
        self._kinds: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)

    def add(self, record: Mapping[str, Any], source: str) -> None:
        """Append one row and count it as of a data set."""
        self.write(record)
        self.written[source] += 1
        for name in COUNTED:
            if record.get(name) is not None:
                self._kinds[source, name][str(record[name])] += 1

    def record(self) -> dict[str, Any]:
        """For the card: the file, and per data set what was read, left out and written."""
        sources = {
            source: {
                "questions": self.written[source],
                "read": self.read[source],
                "left_out": dict(self.left_out[source]),
                **{
                    name: dict(sorted(self._kinds[source, name].items()))
                    for name in COUNTED
                    if (source, name) in self._kinds
                },
            }
            for source in {**self.read, **self.written}
        }
        return self.stamp() | {"questions": len(self), "sources": sources}
