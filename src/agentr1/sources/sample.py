"""So many rows of a stream, chosen by seed: the same ones in whatever order they come.

Layer 1. A row's rank is a hash of the seed and its id; the lowest ranks are kept. So the rows of a
smaller sample are also in a larger one of the same seed.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Mapping
from typing import Any

from agentr1.sources.passages import digest


class Sample:
    """The `n` rows of lowest rank seen so far, kept as text.

    Args:
        n: rows to keep.
        seed: of the ranks.
        name: of the data set they are read for.
    """

    def __init__(self, n: int, seed: int, name: str) -> None:
        self.name = name
        self._n = n
        self._seed = str(seed)
        self._heap: list[tuple[int, str]] = []  # (-rank, line): the highest rank comes out first

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, row: Mapping[str, Any]) -> None:
        """Keep a row if its rank is among the lowest."""
        rank = -digest(self._seed, row["source"], row["id"])
        if len(self._heap) < self._n:
            heapq.heappush(self._heap, (rank, json.dumps(row)))
        elif rank > self._heap[0][0]:
            heapq.heapreplace(self._heap, (rank, json.dumps(row)))


def mixed(samples: Iterable[Sample]) -> Iterable[tuple[str, dict[str, Any]]]:
    """The rows of all samples by rank, which mixes them evenly, and what they were read for."""
    entries = [(*entry, sample.name) for sample in samples for entry in sample._heap]
    entries.sort(reverse=True)
    return ((name, json.loads(line)) for _, line, name in entries)
