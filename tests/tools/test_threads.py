"""Blocking functions run off the loop, in threads that are used again and hold up nothing."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

from agentr1.tools import threads
from agentr1.tools.threads import in_daemon_thread


def test_a_thread_gives_its_result_or_its_own_exception():
    error = KeyError("mine")

    def fail():
        raise error

    async def main():
        assert await in_daemon_thread(lambda x: x + 1, x=1) == 2
        with pytest.raises(KeyError) as caught:
            await in_daemon_thread(fail)
        assert caught.value is error

    asyncio.run(main())


def test_a_thread_that_came_back_is_used_again():
    async def main():
        return [await in_daemon_thread(threading.get_ident) for _ in range(50)]

    assert len({*asyncio.run(main()), *asyncio.run(main())}) == 1


def test_a_hung_function_takes_no_thread_from_others():
    release = threading.Event()

    async def main():
        hung = [asyncio.ensure_future(in_daemon_thread(release.wait, timeout=20)) for _ in range(9)]
        await asyncio.sleep(0.01)
        assert [await in_daemon_thread(lambda x: x, x=i) for i in range(20)] == list(range(20))
        for wait in hung:
            wait.cancel()

    asyncio.run(asyncio.wait_for(main(), 10))
    release.set()


def test_no_call_is_lost_when_its_thread_was_about_to_end(monkeypatch):
    monkeypatch.setattr(threads, "_IDLE_SECONDS", 1e-5)

    async def main():
        return [await in_daemon_thread(lambda x: x, x=i) for i in range(2000)]

    assert asyncio.run(asyncio.wait_for(main(), 60)) == list(range(2000))


def test_an_idle_thread_keeps_no_result_alive():
    class Large:
        pass

    async def main():
        return weakref.ref(await in_daemon_thread(Large))

    result = asyncio.run(main())
    deadline = time.monotonic() + 5
    while result() is not None and time.monotonic() < deadline:  # the thread is about to let go
        gc.collect()
        time.sleep(0.001)
    assert result() is None


def test_a_result_that_comes_after_its_loop_is_dropped():
    release, left = threading.Event(), threading.Event()

    def late():
        release.wait(10)
        left.set()

    async def main():
        wait = asyncio.ensure_future(in_daemon_thread(late))
        await asyncio.sleep(0.01)
        wait.cancel()

    asyncio.run(main())
    release.set()
    assert left.wait(10)
    assert asyncio.run(in_daemon_thread(lambda: "next")) == "next"


def test_a_forked_process_starts_threads_of_its_own():
    script = """
import asyncio, os
from agentr1.tools.threads import in_daemon_thread
assert asyncio.run(in_daemon_thread(lambda: 1)) == 1
child = os.fork()
if not child:
    os._exit(asyncio.run(asyncio.wait_for(in_daemon_thread(lambda: 7), 20)))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "7", done.stderr
