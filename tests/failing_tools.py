"""The quickstart's search on a bad day; a command line names one as its tool, or the reward.

Each is what a tool author might have written: it raises, or does not answer, and knows nothing of
turns, masks or signals.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentr1.tools.search import Search


class BadDay:
    """Searches, but a share of the calls fails, and from the `hangs_from`-th on none returns."""

    name = Search.name
    description = Search.description
    parameters = Search.parameters

    def __init__(self, search: Search, share: float = 0.0, hangs_from: float = math.inf) -> None:
        self.search = search
        self.share = share
        self.hangs_from = hangs_from
        self.calls = 0
        self.draws = random.Random(0)

    async def __call__(self, query: str) -> Any:
        self.calls += 1
        if self.calls >= self.hangs_from:
            print("a call hangs", flush=True)
            await asyncio.sleep(3600)
        if self.draws.random() < self.share:
            raise ConnectionError("the search server closed the connection")
        return await self.search(query)


def now_and_then(corpus: Path, k: int) -> BadDay:
    """One call in twenty fails."""
    return BadDay(Search.from_corpus(corpus, k), 0.05)


def mostly(corpus: Path, k: int) -> BadDay:
    """Nine calls in ten fail."""
    return BadDay(Search.from_corpus(corpus, k), 0.9)


def hanging(corpus: Path, k: int) -> BadDay:
    """No call is ever answered."""
    return BadDay(Search.from_corpus(corpus, k), hangs_from=1)


def hanging_later(corpus: Path, k: int) -> BadDay:
    """A few calls, those of a test before the training, are answered."""
    return BadDay(Search.from_corpus(corpus, k), hangs_from=4)


def interrupted_reward(trajectories: Sequence[Any], **_: object) -> list[float]:
    """Somebody presses Ctrl-C while the batch is scored."""
    os.kill(os.getpid(), signal.SIGINT)
    return [0.0] * len(trajectories)
