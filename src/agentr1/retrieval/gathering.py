"""From many who ask for one query each to an index that takes many queries at once.

Layer 1, between `Index` and `Retriever`: the queries of concurrent episodes, in whatever event loop
they run, become few searches in daemon threads. Used in process by tools and environments, and by
the server for the requests of its clients. Knows neither which index it asks nor who asks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Sequence

from agentr1.retrieval.base import Hit, Index
from agentr1.tools.threads import start_daemon

Found = list[list[Hit]]


class Gathered:
    """An index as a retriever.

    What is asked in one turn of an event loop, and what is asked while searches run, goes into one
    `Index.search` together. A wait that is cancelled disturbs nobody: its queries are dropped if
    they are not being searched yet. An error of a search reaches all whose queries were in it.

    Args:
        index: answers the queries.
        max_batch: queries of one search at most.
        at_once: searches that run at the same time at most: 1 where they would only compete for the
            same cores, more for a server far away.
        in_thread: search off the event loop. False only for an index that answers within a
            millisecond: anything slower would hold up every other episode.
    """

    def __init__(
        self, index: Index, *, max_batch: int = 64, at_once: int = 1, in_thread: bool = True
    ) -> None:
        for name, value in (("max_batch", max_batch), ("at_once", at_once)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected a whole number of at least 1")
        self.index = index
        self.max_batch = max_batch
        self.at_once = at_once
        self.in_thread = in_thread
        self._waiting: deque[_Asked] = deque()
        self._searching = 0
        self._lock = threading.Lock()  # loops of several threads may ask

    async def find(self, query: str, k: int) -> list[Hit]:
        """Return at most `k` hits, best first, none where nothing matches."""
        if not self.in_thread:
            return self.index.search([query], k)[0]
        return (await self._ask([query], k))[0]

    async def find_all(self, queries: Sequence[str], k: int) -> Found:
        """The hits of several queries that belong together, in their order."""
        if not self.in_thread:
            return self.index.search(queries, k)
        starts = range(0, len(queries), self.max_batch)
        parts = [self._ask(queries[start : start + self.max_batch], k) for start in starts]
        return [hits for found in await asyncio.gather(*parts) for hits in found]

    async def _ask(self, queries: Sequence[str], k: int) -> Found:
        loop = asyncio.get_running_loop()
        asked = _Asked(queries, k, loop, loop.create_future())
        with self._lock:
            self._waiting.append(asked)
            place_free = self._searching < self.at_once
        if place_free:  # otherwise who searches takes it along next
            # After those who ask in the same turn of the loop: they are one search, not two.
            loop.call_soon(self._start)
        return await asked.answer

    def _start(self) -> None:
        while batch := self._next():
            try:
                start_daemon(lambda batch=batch: self._search(batch))
                return
            except BaseException as error:  # no further thread: who waits must not wait for ever
                with self._lock:
                    self._searching -= 1
                _deliver(batch, [], error)

    def _next(self) -> list[_Asked]:
        """The callers of one more search, if one more may run."""
        with self._lock:
            batch = self._take() if self._searching < self.at_once else []
            self._searching += bool(batch)
        return batch

    def _search(self, batch: list[_Asked]) -> None:
        """Search for a batch, then for whoever waits by then."""
        while batch:
            found: Found = []
            error = None
            try:
                queries = [query for asked in batch for query in asked.queries]
                found = self.index.search(queries, batch[0].k)
                if len(found) != len(queries):
                    kind = type(self.index).__name__
                    raise RuntimeError(
                        f"{kind} gave {len(found)} results for {len(queries)} queries"
                    )
            except BaseException as raised:  # whatever it is, who waits must not wait for ever
                error = raised
            _deliver(batch, found, error)
            with self._lock:
                batch = self._take()
                self._searching -= not batch

    def _take(self) -> list[_Asked]:
        """The callers of the next search, all with one `k`; the lock is held."""
        batch: list[_Asked] = []
        passed: list[_Asked] = []
        size = 0
        while self._waiting and size < self.max_batch:
            asked = self._waiting.popleft()
            if asked.answer.done():  # cancelled
                continue
            # How many hits are asked for may change which ones an approximate index finds.
            fits = not batch or (
                asked.k == batch[0].k and size + len(asked.queries) <= self.max_batch
            )
            (batch if fits else passed).append(asked)
            size += len(asked.queries) * fits
        self._waiting.extendleft(reversed(passed))
        return batch


@dataclasses.dataclass(slots=True, eq=False)
class _Asked:
    """Queries of one caller, and where it waits."""

    queries: Sequence[str]
    k: int
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Found]


def _deliver(batch: Sequence[_Asked], found: Found, error: BaseException | None) -> None:
    """Hand every caller its part, with one wake-up per event loop."""
    settled: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
    start = 0
    for asked in batch:
        part = found[start : start + len(asked.queries)]
        start += len(asked.queries)
        settled.setdefault(asked.loop, []).append(_settling(asked.answer, part, error))
    for loop, settlings in settled.items():

        def settle(settlings: Sequence[Callable[[], None]] = settlings) -> None:
            for one in settlings:
                one()

        try:
            loop.call_soon_threadsafe(settle)
        except RuntimeError:  # the loop is closed: nobody waits any more
            continue


def _settling(
    answer: asyncio.Future[Found], part: Found, error: BaseException | None
) -> Callable[[], None]:
    def settle() -> None:
        if answer.done():  # cancelled
            return
        if error is None:
            answer.set_result(part)
        elif isinstance(error, Exception) and not isinstance(error, StopIteration):
            answer.set_exception(error)
        else:  # asyncio cannot carry a StopIteration, and a sys.exit() is not to end the run
            answer.set_exception(RuntimeError(f"the index raised {type(error).__name__}"))

    return settle
