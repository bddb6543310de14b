"""Blocking functions off the event loop, in daemon threads that are used again.

Layer 1, below `tools/base.py`. No executor serves here: a function that hangs would use up its
places and keep the interpreter from exiting. Here every call has a thread to itself while it runs,
and the thread of one that came back waits a while for the next, since starting one costs several
times as much as handing work over. Nothing in this module knows tools.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

_IDLE_SECONDS = 10.0
"""A thread without work ends after so long."""


async def in_daemon_thread(function: Callable[..., Any], /, **arguments: Any) -> Any:
    """Run a blocking function off the event loop.

    A wait that is cancelled abandons the function: it runs on in its thread, its result is dropped
    and nothing waits for it, the end of the program included.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def work() -> Callable[[], None]:
        try:
            result, error = context.run(function, **arguments), None
        except BaseException as raised:
            # asyncio cannot carry a StopIteration (the caller would wait for ever), and a
            # sys.exit() inside a tool is to end the call, not the run.
            carried = isinstance(raised, Exception) and not isinstance(raised, StopIteration)
            other = RuntimeError(f"the function raised {type(raised).__name__}")
            result, error = None, raised if carried else other
        return lambda: _deliver(answer, result, error)

    _idle_worker().give(work)
    return await answer


def start_daemon(function: Callable[[], None]) -> None:
    """Run a blocking function in a daemon thread that nobody waits for; it must not raise."""

    def work() -> Callable[[], None]:
        function()
        return lambda: None

    _idle_worker().give(work)


class _Worker:
    """One daemon thread and its letter box."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._box: queue.SimpleQueue[Callable[[], Callable[[], None]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="tool", daemon=True).start()

    def give(self, work: Callable[[], Callable[[], None]]) -> None:
        self._box.put(work)

    def _serve(self) -> None:
        while True:
            try:
                work = self._box.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                try:
                    _IDLE.remove(self)
                except ValueError:  # taken this very moment: its work is on the way
                    continue
                return
            deliver = work()
            # Idle before the result is out, so that who gets it can give the next work here.
            _IDLE.append(self)
            deliver()
            del work, deliver  # an idle thread keeps no result alive


_IDLE: deque[_Worker] = deque()
"""One for the process, since a tool knows no runner; each of its operations is atomic."""


def _idle_worker() -> _Worker:
    while True:
        try:
            worker = _IDLE.pop()
        except IndexError:
            return _Worker()
        if worker.process == os.getpid():  # a forked process inherits the list, not the threads
            return worker


def _deliver(answer: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    def settle() -> None:
        if answer.done():  # cancelled
            return
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)

    try:
        answer.get_loop().call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed: nobody waits any more
        return
