"""Slots are never exceeded nor lost, and equal calls share one result."""

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.tools.sharing import SharedResults, Slots
from agentr1.types import ToolOutcome

# Slots


@given(
    count=st.integers(1, 4),
    holders=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5), st.none() | st.integers(0, 12)),
        max_size=20,
    ),
)
def test_slots_are_never_exceeded_and_none_is_lost_to_a_cancellation(count, holders):
    slots = Slots(count)
    inside = most = 0

    async def hold(arrives, stays):
        nonlocal inside, most
        for _ in range(arrives):
            await asyncio.sleep(0)
        await slots.acquire()
        inside += 1
        most = max(most, inside)
        try:
            for _ in range(stays):
                await asyncio.sleep(0)
        finally:
            inside -= 1
            slots.release()

    async def main():
        tasks = [asyncio.ensure_future(hold(arrives, stays)) for arrives, stays, _ in holders]
        for moment in range(13):
            for task, (_, _, cancelled) in zip(tasks, holders, strict=True):
                if cancelled == moment:
                    task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)

    asyncio.run(main())
    assert most <= count
    assert [slots.take() for _ in range(count + 1)] == [True] * count + [False]


def test_who_waited_longest_comes_first():
    async def main():
        slots = Slots(1)
        assert slots.take()
        order = []

        async def enter(i):
            await slots.acquire()
            order.append(i)
            slots.release()

        tasks = [asyncio.ensure_future(enter(i)) for i in range(5)]
        await asyncio.sleep(0)
        slots.release()
        await asyncio.gather(*tasks)
        assert order == list(range(5))

    asyncio.run(main())


def test_a_limit_holds_over_loops_in_several_threads():
    slots, lock = Slots(2), threading.Lock()
    inside, seen = 0, []

    async def use():
        nonlocal inside
        await slots.acquire()
        with lock:
            inside += 1
            seen.append(inside)
        await asyncio.sleep(0.001)
        with lock:
            inside -= 1
        slots.release()

    async def main():
        await asyncio.gather(*(use() for _ in range(20)))

    loops = [threading.Thread(target=asyncio.run, args=(main(),), daemon=True) for _ in range(4)]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join(20)
    assert len(seen) == 80
    assert max(seen) == 2


def test_a_waiter_whose_loop_is_gone_swallows_no_slot():
    slots = Slots(1)
    assert slots.take()
    loop = asyncio.new_event_loop()
    waiter = loop.create_task(slots.acquire())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    slots.release()
    assert slots.take()
    waiter._log_destroy_pending = False


# Results


class Calls:
    """Answers calls when told to, and counts."""

    def __init__(self, failure=None):
        self.failure, self.started, self.cancelled = failure, 0, 0

    async def __call__(self):
        self.started += 1
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        content = f"result {self.started}"
        return ToolOutcome("id", "tool", {}, content, failure=self.failure)


def test_equal_calls_are_run_once_and_told_apart_from_others():
    async def main():
        results, run = SharedResults(10), Calls()
        found = await asyncio.gather(*(results.get("a", run) for _ in range(5)))
        assert [shared for _, shared in found] == [False, True, True, True, True]
        assert await results.get("a", run) == (found[0][0], True)
        assert run.started == 1
        other, shared = await results.get("b", run)
        assert (other.content, shared) == ("result 2", False)

    asyncio.run(main())


def test_a_result_outlives_its_loop():
    results, run = SharedResults(10), Calls()
    asyncio.run(results.get("a", run))
    assert asyncio.run(results.get("a", run))[1]


@pytest.mark.parametrize("failure", ["mistake", "fault"])
def test_a_failure_is_shared_by_those_who_joined_and_by_nobody_later(failure):
    async def main():
        results, run = SharedResults(10), Calls(failure)
        found = await asyncio.gather(*(results.get("a", run) for _ in range(3)))
        assert {outcome.failure for outcome, _ in found} == {failure}
        assert run.started == 1
        assert not (await results.get("a", run))[1]
        assert run.started == 2

    asyncio.run(main())


def test_the_results_used_last_are_kept():
    async def main():
        results, run = SharedResults(2), Calls()
        for call in ("a", "b", "a", "c"):  # b is the one used longest ago
            await results.get(call, run)
        assert run.started == 3
        assert [(await results.get(call, run))[1] for call in ("a", "c", "b")] == [
            True,
            True,
            False,
        ]

    asyncio.run(main())


@given(st.sets(st.integers(0, 4), max_size=5))
def test_a_call_goes_on_as_long_as_somebody_waits_for_it(leavers):
    async def main():
        results, run = SharedResults(10), Calls()
        tasks = [asyncio.ensure_future(results.get("a", run)) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for i in leavers:
            tasks[i].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
        cancelled = {i for i, result in enumerate(found) if not isinstance(result, tuple)}
        assert cancelled == leavers
        assert run.started == 1
        assert run.cancelled == (len(leavers) == 5)
        again = await results.get("a", run)  # what was cancelled is not joined
        assert again[0].failure is None
        assert run.started == 1 + (len(leavers) == 5)

    asyncio.run(main())


def test_a_call_that_is_being_cancelled_is_not_joined():
    async def main():
        results, run = SharedResults(10), Calls()
        first = asyncio.ensure_future(results.get("a", run))
        await asyncio.sleep(0.001)
        first.cancel()
        outcome, shared = await asyncio.ensure_future(results.get("a", run))
        assert (outcome.content, shared) == ("result 2", False)

    asyncio.run(main())
