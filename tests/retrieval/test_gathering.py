"""Many who ask at once become few searches, and nobody is answered with another's passages."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.retrieval import gathering
from agentr1.retrieval.base import Hit
from agentr1.retrieval.gathering import Gathered
from retrieval.indexes import EchoIndex, GatedIndex, echo


async def entered(index: GatedIndex) -> None:
    while not index.entered.acquire(blocking=False):
        await asyncio.sleep(0.001)


def test_what_is_asked_together_is_one_search_off_the_event_loop() -> None:
    index = EchoIndex()

    async def ask() -> list[list[Hit]]:
        gathered = Gathered(index)
        return await asyncio.gather(*(gathered.find(f"q{i}", 2) for i in range(10)))

    assert asyncio.run(ask()) == [echo(f"q{i}", 2) for i in range(10)]
    assert index.asked == [(tuple(f"q{i}" for i in range(10)), 2)]
    assert index.threads != [threading.main_thread()]


def test_what_is_asked_while_a_search_runs_is_the_next_one() -> None:
    index = GatedIndex()

    async def ask() -> None:
        gathered = Gathered(index)
        first = asyncio.ensure_future(gathered.find("first", 1))
        await entered(index)
        later = []
        for i in range(5):
            later.append(asyncio.ensure_future(gathered.find(f"later {i}", 1)))
            await asyncio.sleep(0)
        index.gate.release(2)
        assert await first == echo("first", 1)
        assert await asyncio.gather(*later) == [echo(f"later {i}", 1) for i in range(5)]

    asyncio.run(ask())
    assert [len(queries) for queries, _ in index.asked] == [1, 5]


def test_different_k_are_never_searched_together() -> None:
    index = EchoIndex()

    async def ask() -> list[list[Hit]]:
        gathered = Gathered(index)
        return await asyncio.gather(*(gathered.find(f"q{i}", 1 + i % 2) for i in range(6)))

    assert asyncio.run(ask()) == [echo(f"q{i}", 1 + i % 2) for i in range(6)]
    assert index.asked == [(("q0", "q2", "q4"), 1), (("q1", "q3", "q5"), 2)]


def test_no_search_is_larger_than_max_batch() -> None:
    index = EchoIndex()
    queries = [f"q{i}" for i in range(10)]

    async def ask() -> list[list[Hit]]:
        return await Gathered(index, max_batch=4).find_all(queries, 1)

    assert asyncio.run(ask()) == [echo(query, 1) for query in queries]
    assert max(len(asked) for asked, _ in index.asked) == 4


def test_no_more_searches_run_than_allowed() -> None:
    index = GatedIndex()

    async def ask(at_once: int) -> int:
        gathered = Gathered(index, max_batch=1, at_once=at_once)
        asked = [asyncio.ensure_future(gathered.find(f"q{i}", 1)) for i in range(6)]
        for _ in range(at_once):
            await entered(index)
        await asyncio.sleep(0.05)
        more = index.entered.acquire(blocking=False)
        index.gate.release(6)
        await asyncio.gather(*asked)
        while index.entered.acquire(blocking=False):
            pass
        return int(more)

    assert asyncio.run(ask(1)) == 0
    assert asyncio.run(ask(3)) == 0


def test_who_leaves_disturbs_nobody_and_is_not_searched_for() -> None:
    index = GatedIndex()

    async def ask() -> None:
        gathered = Gathered(index)
        first = asyncio.ensure_future(gathered.find("first", 1))
        await entered(index)
        leaving = asyncio.ensure_future(gathered.find("leaving", 1))
        staying = asyncio.ensure_future(gathered.find("staying", 1))
        await asyncio.sleep(0)
        leaving.cancel()
        first.cancel()  # its search runs already
        await asyncio.sleep(0)
        index.gate.release(2)
        assert await staying == echo("staying", 1)
        assert first.cancelled()
        assert leaving.cancelled()

    asyncio.run(ask())
    assert [queries for queries, _ in index.asked] == [("first",), ("staying",)]


def test_who_leaves_during_a_search_takes_nobodys_answer_along() -> None:
    index = GatedIndex()

    async def ask() -> None:
        gathered = Gathered(index)
        leaving, staying = (asyncio.ensure_future(gathered.find(q, 1)) for q in ("a", "b"))
        await entered(index)
        leaving.cancel()
        await asyncio.sleep(0)
        index.gate.release()
        assert await asyncio.wait_for(staying, 10) == echo("b", 1)

    asyncio.run(ask())
    assert [queries for queries, _ in index.asked] == [("a", "b")]


class BrokenIndex(EchoIndex):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        if "bad" in queries:
            raise self.error
        return super().search(queries, k)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("gone"), ConnectionError),
        (StopIteration(), RuntimeError),
        (SystemExit(1), RuntimeError),
    ],
)
def test_an_error_reaches_all_who_wait_for_that_search_and_nobody_else(
    error: BaseException, kind: type[Exception]
) -> None:
    async def ask() -> None:
        gathered = Gathered(BrokenIndex(error))
        together = [gathered.find(query, 1) for query in ("good", "bad", "fine")]
        results = await asyncio.gather(*together, return_exceptions=True)
        assert [type(result) for result in results] == [kind] * 3
        assert await gathered.find("good", 1) == echo("good", 1)

    asyncio.run(ask())


def test_without_a_thread_who_waits_is_told_and_the_next_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(function: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    async def ask() -> None:
        gathered = Gathered(EchoIndex(), max_batch=2)
        with monkeypatch.context() as patch:
            patch.setattr(gathering, "start_daemon", refuse)
            waiting = (gathered.find(f"q{i}", 1) for i in range(5))
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(result) for result in results] == ["can't start new thread"] * 5
        assert await gathered.find("q", 1) == echo("q", 1)

    asyncio.run(asyncio.wait_for(ask(), 10))


def test_an_index_that_loses_a_query_is_an_error_and_no_mix_up() -> None:
    class Losing(EchoIndex):
        def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
            return super().search(queries, k)[1:]

    async def ask() -> None:
        gathered = Gathered(Losing())
        await asyncio.gather(gathered.find("a", 1), gathered.find("b", 1))

    with pytest.raises(RuntimeError, match="Losing gave 1 results for 2 queries"):
        asyncio.run(ask())


def test_many_event_loops_one_after_another_and_at_once_share_it() -> None:
    index = EchoIndex()
    gathered = Gathered(index)
    wrong: list[str] = []

    def run(name: str) -> None:
        async def ask() -> None:
            queries = [f"{name} {i}" for i in range(20)]
            found = await asyncio.gather(*(gathered.find(query, 2) for query in queries))
            wrong.extend(q for q, hits in zip(queries, found, strict=True) if hits != echo(q, 2))

        for _ in range(5):
            asyncio.run(ask())

    threads = [threading.Thread(target=run, args=(f"loop {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not wrong
    assert sum(len(queries) for queries, _ in index.asked) == 4 * 5 * 20


def test_a_loop_that_ended_with_a_wait_open_stops_nobody() -> None:
    index = GatedIndex()
    gathered = Gathered(index)
    loop = asyncio.new_event_loop()
    for query in ("begun", "not begun"):
        task = loop.create_task(gathered.find(query, 1))
        loop.call_soon(loop.stop)
        loop.run_forever()
    loop.close()  # asyncio.run would have cancelled the tasks
    index.gate.release(3)

    async def ask() -> list[Hit]:
        return await gathered.find("another", 1)

    assert asyncio.run(asyncio.wait_for(ask(), 10)) == echo("another", 1)
    task._log_destroy_pending = False
    del task
    gc.collect()


def test_an_index_known_to_be_fast_is_asked_on_the_event_loop() -> None:
    index = EchoIndex()
    gathered = Gathered(index, in_thread=False)
    assert asyncio.run(gathered.find("q", 2)) == echo("q", 2)
    assert asyncio.run(gathered.find_all(["a", "b"], 1)) == [echo("a", 1), echo("b", 1)]
    assert set(index.threads) == {threading.main_thread()}


@pytest.mark.parametrize("limits", [{"max_batch": 0}, {"at_once": 0}])
def test_limits_below_one_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected a whole number of at least 1"):
        Gathered(EchoIndex(), **limits)


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.text("abc", max_size=3), max_size=5),  # queries
        st.integers(1, 3),  # k
        st.integers(0, 4),  # turns of the loop before it is asked
        st.booleans(),  # whether it is cancelled after as many
    ),
    max_size=12,
)


@given(requests=REQUESTS, max_batch=st.integers(1, 6), at_once=st.integers(1, 3))
def test_in_any_interleaving_everyone_gets_what_a_search_alone_gives(
    requests: list[tuple[list[str], int, int, bool]], max_batch: int, at_once: int
) -> None:
    index = EchoIndex()
    gathered = Gathered(index, max_batch=max_batch, at_once=at_once)

    async def one(queries: list[str], k: int, turns: int) -> list[list[Hit]]:
        for _ in range(turns):
            await asyncio.sleep(0)
        return await gathered.find_all(queries, k)

    async def ask() -> None:
        tasks = [asyncio.ensure_future(one(*request[:3])) for request in requests]
        for task, (*_, turns, leaves) in zip(tasks, requests, strict=True):
            await asyncio.sleep(0)
            if leaves and turns > 2:
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for (queries, k, *_), result in zip(requests, results, strict=True):
            if not isinstance(result, asyncio.CancelledError):
                assert result == [echo(query, k) for query in queries]

    asyncio.run(asyncio.wait_for(ask(), 20))
    assert all(len(queries) <= max_batch for queries, _ in index.asked)
