"""The tool of the scripted rollouts: what it finds is fixed, how long it takes is set."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class SlowSearch:
    """A search that always finds the same and takes as long as it is told, call by call."""

    def __init__(self, found: str) -> None:
        self.found = found
        self._waits: list[list[float]] = []
        self._calls = 1
        self._left: list[Iterator[float]] = []
        self._caller: contextvars.ContextVar[int] = contextvars.ContextVar("caller")

    def takes(self, waits: Sequence[Sequence[float]], calls: int = 1) -> None:
        """Set the seconds of each rollout's calls, in their order; `calls` of them make a turn."""
        self._waits = [list(mine) for mine in waits]
        self._calls = calls

    def begin(self) -> None:
        """Start the waits anew, for another run."""
        self._left = [iter(mine) for mine in self._waits]

    def called_by(self, rollout: int) -> None:
        """Say whose waits the calls from this context are."""
        self._caller.set(rollout)

    @property
    def total(self) -> float:
        """Seconds of all waits one after another."""
        return sum(map(sum, self._waits))

    @property
    def longest(self) -> float:
        """Seconds of the rollout that waits most; the calls of a turn wait together."""
        turns = [
            [mine[i : i + self._calls] for i in range(0, len(mine), self._calls)]
            for mine in self._waits
        ]
        return max(sum(map(max, mine)) for mine in turns)

    def functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The tool as a blocking and as an asynchronous function, alike to the policy."""

        # No return type: TRL would show it to the policy, and the prompts are to be equal.
        def search(query: str):
            """Search the corpus for passages.

            Args:
                query: What to look for.
            """
            time.sleep(next(self._left[self._caller.get()]))
            return self.found

        @functools.wraps(search)
        async def search_async(query: str):
            await asyncio.sleep(next(self._left[self._caller.get()]))
            return self.found

        return search, search_async

    def of(self, rollout: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """One rollout's own copy of one of the functions, for a caller without contexts."""

        @functools.wraps(function)
        def mine(query: str):
            self.called_by(rollout)
            return function(query)

        @functools.wraps(function)
        async def mine_async(query: str):
            self.called_by(rollout)
            return await function(query)

        return mine_async if inspect.iscoroutinefunction(function) else mine
