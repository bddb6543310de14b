"""What the calls of many rollouts share: the places a tool has, and the results it gave.

Layer 1, below `tools/runner.py`, which has one `Slots` per tool and one `SharedResults`. Both hold
across event loops: each training step runs its own, and a notebook may run two at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from typing import Any

from agentr1.types import ToolOutcome


class Slots:
    """At most `count` holders at once, whatever loop or thread they are in; first come first.

    An `asyncio.Semaphore` belongs to one loop, so that each loop would have its own `count`.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take a slot if one is free."""
        with self._lock:
            free = self._free > 0
            self._free -= free
            return free

    async def acquire(self) -> None:
        """Take a slot, waiting where none is free; a cancelled wait takes none."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            with self._lock:
                handed_over = turn not in self._waiting
                if not handed_over:
                    self._waiting.remove(turn)
            if handed_over:
                self.release()
            raise

    def release(self) -> None:
        """Hand the slot to who has waited longest, or put it back."""
        with self._lock:
            while self._waiting:
                turn = self._waiting.popleft()
                try:
                    turn.get_loop().call_soon_threadsafe(_wake, turn)
                except RuntimeError:  # its loop is closed
                    continue
                return
            self._free += 1


def _wake(turn: asyncio.Future[None]) -> None:
    if not turn.done():  # cancelled since; the waiter passes the slot on
        turn.set_result(None)


@dataclasses.dataclass(slots=True)
class _Running:
    """A call under way and how many wait for it."""

    task: asyncio.Task[ToolOutcome]
    waiting: int = 0


class SharedResults:
    """Successful results by call, the most recently used ones, and calls under way to join."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[str, ToolOutcome] = OrderedDict()
        self._lock = threading.Lock()
        # By loop as well: a task can be waited for in its own loop only.
        self._running: dict[tuple[str, asyncio.AbstractEventLoop], _Running] = {}

    async def get(
        self, call: str, run: Callable[[], Coroutine[Any, Any, ToolOutcome]]
    ) -> tuple[ToolOutcome, bool]:
        """The outcome of a call, and whether it is another one's.

        Who joins a call under way shares whatever becomes of it, a failure too. The call itself
        is cancelled only when nobody waits for it any more.
        """
        with self._lock:
            if call in self._kept:
                self._kept.move_to_end(call)
                return self._kept[call], True
        key = (call, asyncio.get_running_loop())
        joined = key in self._running
        if not joined:
            self._running[key] = _Running(asyncio.ensure_future(self._run(key, run)))
        running = self._running[key]
        running.waiting += 1
        try:
            return await asyncio.shield(running.task), joined
        finally:
            running.waiting -= 1
            if not running.waiting and not running.task.done():
                self._running.pop(key, None)  # nobody joins what is being cancelled
                running.task.cancel()

    async def _run(
        self,
        key: tuple[str, asyncio.AbstractEventLoop],
        run: Callable[[], Coroutine[Any, Any, ToolOutcome]],
    ) -> ToolOutcome:
        this = asyncio.current_task()
        try:
            outcome = await run()
        finally:
            if key in self._running and self._running[key].task is this:
                del self._running[key]
        if outcome.failure is None:
            with self._lock:
                self._kept[key[0]] = outcome
                if len(self._kept) > self._size:
                    self._kept.popitem(last=False)
        return outcome
