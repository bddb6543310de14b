"""From ordinary code into an event loop and back.

Layer 1. Rollouts, checks and weight syncs are coroutines; whoever calls them from the outside, a
notebook included, does it here.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

_Result = TypeVar("_Result")


def finish(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine to its end from ordinary code, a notebook's running event loop included."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    # A loop cannot be entered twice: a thread has one of its own.
    done: Future[_Result] = Future()

    def run() -> None:
        try:
            done.set_result(asyncio.run(work))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="agentr1 event loop").start()
    return done.result()
