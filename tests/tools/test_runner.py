"""Calls of a turn run together, come back in order, and fail only as a mistake or a fault."""

import asyncio
import logging
import random
import subprocess
import sys
import threading
import time

import pytest

from agentr1.parsing import MalformedCall, parse_turn
from agentr1.tools.base import ToolError, tool
from agentr1.tools.policy import EpisodeCalls, ToolPolicy
from agentr1.tools.runner import ToolRunner
from agentr1.types import ToolCall, ToolResult
from fakes import CountingTool


class Answering:
    """A tool that answers whatever it is given to answer, or raises it."""

    description = "Answer."
    parameters = {"type": "object", "properties": {}}

    def __init__(self, answer=None, name="answering"):
        self.name = name
        self.answer = answer

    async def __call__(self):
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class Counting:
    """A tool that counts how many of its calls run at once and waits until `width` of them do."""

    name = "counting"
    description = "Count."
    parameters = {"type": "object", "properties": {}}

    def __init__(self, width):
        self.width, self.running, self.most = width, 0, 0

    async def __call__(self):
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running == self.width:
            self.full.set()
        await self.full.wait()
        await asyncio.sleep(0)
        self.running -= 1
        return "counted"


def calls(name, count=1, **arguments):
    return [ToolCall(f"call_{i}", name, arguments) for i in range(count)]


def outcome(answer, **limits):
    runner = ToolRunner([Answering(answer)], default_policy=ToolPolicy(**limits))
    (result,) = asyncio.run(runner.run(calls("answering")))
    result.content.encode("utf-8")
    return result


@tool
def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: One.
        b: Other.
    """
    return a + b


# Order and concurrency


def test_outcomes_keep_call_order_though_tools_finish_in_reverse():
    async def main():
        finished = [asyncio.Event() for _ in range(5)]
        order = []

        @tool
        async def ordered(i: int) -> str:
            """Finish after the next one.

            Args:
                i: Place.
            """
            if i + 1 < len(finished):
                await finished[i + 1].wait()
            order.append(i)
            finished[i].set()
            return f"result {i}"

        asked = [ToolCall(f"id{i}", "ordered", {"i": i}) for i in range(5)]
        outcomes = await ToolRunner([ordered]).run(asked)
        assert order == [4, 3, 2, 1, 0]
        assert [o.call_id for o in outcomes] == [call.id for call in asked]
        assert [o.content for o in outcomes] == [f"result {i}" for i in range(5)]

    asyncio.run(main())


def test_refused_and_malformed_calls_keep_their_place():
    text = (
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><tool_call>oops</tool_call>'
        '<tool_call>{"name": "nope", "arguments": {}}</tool_call>'
        '<tool_call>{"name": "add", "arguments": {"a": 5}}</tool_call>'
    )
    outcomes = asyncio.run(ToolRunner([add]).run(parse_turn(text).calls))
    assert [o.failure for o in outcomes] == [None, "mistake", "mistake", None]
    assert [o.content for o in outcomes][::3] == ["2", "6"]
    assert [o.name for o in outcomes] == ["add", "", "nope", "add"]
    assert [o.call_id for o in outcomes] == ["call_0", "call_1", "call_2", "call_3"]


def test_slow_calls_overlap_and_the_limit_holds_across_turns():
    async def main():
        tool = Counting(width=3)
        tool.full = asyncio.Event()
        runner = ToolRunner([tool], {"counting": ToolPolicy(concurrency=3)})
        turns = await asyncio.gather(*(runner.run(calls("counting", 4)) for _ in range(3)))
        assert [len(turn) for turn in turns] == [4, 4, 4]
        assert tool.most == 3

    asyncio.run(main())


def test_synchronous_tools_run_side_by_side_off_the_loop():
    barrier = threading.Barrier(4, timeout=5)

    @tool
    def meet() -> str:
        """Wait until four calls are here."""
        barrier.wait()
        return threading.current_thread().name

    outcomes = asyncio.run(ToolRunner([meet]).run(calls("meet", 4)))
    assert [o.failure for o in outcomes] == [None] * 4
    assert threading.main_thread().name not in {o.content for o in outcomes}


def test_one_runner_serves_one_event_loop_after_another():
    runner = ToolRunner([Counting(1)], default_policy=ToolPolicy(concurrency=1))

    async def turn():
        runner.tools[0].full = asyncio.Event()
        return await runner.run(calls("counting", 3))  # two have to wait, which binds a semaphore

    for _ in range(3):
        assert [o.failure for o in asyncio.run(turn())] == [None] * 3


def test_seconds_leave_out_the_wait_for_a_slot():
    async def main():
        @tool
        async def nap() -> str:
            """Sleep a little."""
            await asyncio.sleep(0.01)
            return "done"

        runner = ToolRunner([nap], default_policy=ToolPolicy(concurrency=1))
        start = time.perf_counter()
        outcomes = await runner.run(calls("nap", 4))
        # With the waiting they would add up to more than twice the time that passed.
        assert sum(o.seconds for o in outcomes) <= time.perf_counter() - start

    asyncio.run(main())


# Failures


def test_a_tool_error_is_the_models_mistake_and_tells_it():
    result = outcome(ToolError("the year must be after 1800"))
    assert (result.failure, result.content) == ("mistake", "Error: the year must be after 1800")


@pytest.mark.parametrize("error", [ValueError("bad\nTraceback (most recent call last)"), OSError()])
def test_any_other_exception_is_a_fault_shown_in_one_line(error):
    result = outcome(error)
    assert result.failure == "fault"
    assert type(error).__name__ in result.content
    assert "\n" not in result.content
    assert "Traceback" not in result.content


def test_a_huge_error_message_is_bounded():
    assert len(outcome(ValueError("x" * 10_000_000)).content) < 300
    assert len(outcome(ToolError("x" * 10_000_000), max_chars=100).content) < 200


def test_an_error_that_cannot_be_shown_is_still_a_fault():
    class Broken(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    assert outcome(Broken()).failure == "fault"


def test_a_tool_that_cancels_itself_is_a_fault():
    assert outcome(asyncio.CancelledError()).failure == "fault"


@pytest.mark.parametrize("error", [StopIteration(), SystemExit(3), asyncio.CancelledError()])
def test_what_asyncio_cannot_carry_out_of_a_thread_is_a_fault(error):
    @tool
    def leave() -> str:
        """Raise."""
        raise error

    (result,) = asyncio.run(ToolRunner([leave]).run(calls("leave")))
    assert result.failure == "fault"
    assert type(error).__name__ in result.content


def test_a_hanging_async_tool_times_out_even_if_it_ignores_cancellation():
    async def main():
        released = asyncio.Event()

        @tool
        async def stubborn() -> str:
            """Never give up."""
            while not released.is_set():
                try:
                    await released.wait()
                except asyncio.CancelledError:
                    continue
            return "late"

        runner = ToolRunner([stubborn], default_policy=ToolPolicy(timeout=0.05))
        (result,) = await runner.run(calls("stubborn"))
        released.set()
        assert result.failure == "fault"
        assert "no answer within 0.05 seconds" in result.content

    asyncio.run(main())


def test_a_hanging_synchronous_tool_times_out_and_starves_nobody():
    release = threading.Event()

    @tool
    def hang() -> str:
        """Hang."""
        release.wait(10)
        return "late"

    policies = {"hang": ToolPolicy(timeout=0.05, concurrency=50)}
    runner = ToolRunner([hang, add], policies)
    outcomes = asyncio.run(runner.run([*calls("hang", 50), *calls("add", 3, a=1)]))
    release.set()
    assert [o.failure for o in outcomes] == ["fault"] * 50 + [None] * 3


def test_a_hung_thread_does_not_keep_the_interpreter_from_exiting():
    script = """
import asyncio, threading
from agentr1.tools.base import tool
from agentr1.tools.policy import ToolPolicy
from agentr1.tools.runner import ToolRunner
from agentr1.types import ToolCall
@tool
def hang() -> str:
    '''Hang.'''
    threading.Event().wait()
runner = ToolRunner([hang], default_policy=ToolPolicy(timeout=0.01))
print(asyncio.run(runner.run([ToolCall("a", "hang", {})]))[0].failure)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "fault"), done.stderr


def test_cancelling_the_rollout_cancels_the_tool_and_propagates():
    async def main():
        started, cancelled = asyncio.Event(), asyncio.Event()

        @tool
        async def wait() -> str:
            """Wait for ever."""
            started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return ""

        task = asyncio.ensure_future(ToolRunner([wait]).run(calls("wait")))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(cancelled.wait(), 5)

    asyncio.run(main())


def test_a_fault_is_logged_once_per_kind_with_its_tool_row_and_turn(caplog):
    tool = Answering(ValueError("down"))
    runner = ToolRunner([tool])
    episode = EpisodeCalls(row_id="q17", turn=4)
    with caplog.at_level(logging.WARNING):
        asyncio.run(runner.run(calls("answering", 3), episode))
        tool.answer = OSError("gone")
        asyncio.run(runner.run(calls("answering", 3)))
        tool.answer = ToolError("not a fault")
        asyncio.run(runner.run(calls("answering")))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all("'answering'" in message for message in messages)
    assert "turn 4 of row q17" in messages[0]
    assert "ValueError" in messages[0]
    assert "OSError" in messages[1]


# Retries


def deeds(*answers, **limits):
    """The outcome of one call of a tool that does one thing after the other, and what is left."""
    left = list(answers)

    class Next(Answering):
        async def __call__(self):
            self.answer = left.pop(0)
            return await super().__call__()

    runner = ToolRunner([Next()], default_policy=ToolPolicy(backoff=0, **limits))
    (result,) = asyncio.run(runner.run(calls("answering")))
    return result, left


def test_a_fault_is_tried_again_until_it_succeeds():
    result, left = deeds(OSError("down"), object(), "found", "never", retries=3)
    assert (result.content, result.failure, result.attempts) == ("found", None, 3)
    assert left == ["never"]


def test_retries_that_all_fail_are_one_fault_which_names_the_last():
    result, left = deeds(OSError("first"), OSError("second"), "never", retries=1)
    assert (result.failure, result.attempts, left) == ("fault", 2, ["never"])
    assert "OSError: second" in result.content


@pytest.mark.parametrize("before", [[], [OSError("down")]])
def test_a_mistake_is_never_tried_again(before):
    result, left = deeds(*before, ToolError("no such key"), "never", retries=5)
    assert (result.failure, result.content) == ("mistake", "Error: no such key")
    assert left == ["never"]


def test_a_call_that_is_refused_has_no_attempts():
    bad = [*calls("add", a="1"), *calls("none"), MalformedCall("x", "<tool_call>", "not closed")]
    outcomes = asyncio.run(ToolRunner([add]).run(bad))
    assert [(o.failure, o.attempts) for o in outcomes] == [("mistake", 0)] * 3


@pytest.mark.parametrize(("share", "retries"), [(0.05, 0), (0.05, 1), (0.3, 2), (0.3, 4)])
def test_random_failures_leave_as_many_faults_as_retries_let_through(share, retries):
    draws, count = random.Random(17), 4000

    @tool
    async def flaky() -> str:
        """Fail at random."""
        if draws.random() < share:
            raise OSError("down")
        return "found"

    policy = ToolPolicy(retries=retries, backoff=0, concurrency=count)
    outcomes = asyncio.run(ToolRunner([flaky], default_policy=policy).run(calls("flaky", count)))
    faults = sum(outcome.failure == "fault" for outcome in outcomes)
    expected = share ** (retries + 1)
    assert abs(faults / count - expected) < 4 * (expected * (1 - expected) / count) ** 0.5
    attempts = sum(outcome.attempts for outcome in outcomes)
    expected = sum(share**i for i in range(retries + 1))
    assert attempts / count == pytest.approx(expected, rel=0.05)


def test_a_loop_that_is_held_up_costs_no_tool_its_answer():
    @tool
    async def quick() -> str:
        """Answer within little time, after several rounds of the loop."""
        for _ in range(5):
            await asyncio.sleep(0.01)
        return "found"

    async def main():
        runner = ToolRunner([quick], default_policy=ToolPolicy(timeout=1.0))
        running = asyncio.ensure_future(runner.run(calls("quick")))
        await asyncio.sleep(0.005)  # the tool has begun
        time.sleep(1.5)  # an engine's forward
        return await running

    (result,) = asyncio.run(main())
    assert (result.failure, result.content) == (None, "found")


def test_a_hung_tool_is_given_up_after_its_attempts():
    @tool
    async def hang() -> str:
        """Hang."""
        await asyncio.Event().wait()
        return ""

    policy = ToolPolicy(timeout=0.02, retries=2, backoff=0)
    start = time.perf_counter()
    (result,) = asyncio.run(ToolRunner([hang], default_policy=policy).run(calls("hang")))
    assert (result.failure, result.attempts) == ("fault", 3)
    assert "no answer within 0.02 seconds" in result.content
    assert 0.05 <= result.seconds <= time.perf_counter() - start < 5


@pytest.mark.parametrize("hangs", [False, True])
def test_a_deadline_ends_all_attempts_and_pauses_together(hangs):
    @tool
    async def failing() -> str:
        """Fail or hang."""
        if hangs:
            await asyncio.Event().wait()
        raise OSError("down")

    policy = ToolPolicy(timeout=0.03, retries=10**6, backoff=0.01, deadline=0.1)
    start = time.perf_counter()
    (result,) = asyncio.run(ToolRunner([failing], default_policy=policy).run(calls("failing")))
    assert result.failure == "fault"
    assert 2 <= result.attempts <= 10
    assert time.perf_counter() - start < 5


def test_a_deadline_bounds_the_wait_for_another_slot_but_not_for_the_first():
    release = asyncio.Event()

    @tool
    async def busy(fail: bool) -> str:
        """Fail, or keep the slot.

        Args:
            fail: Which.
        """
        if fail:
            raise OSError("down")
        await release.wait()
        return "done"

    async def main():
        policies = {"busy": ToolPolicy(concurrency=1, retries=9, backoff=0.001, deadline=0.3)}
        runner = ToolRunner([busy], policies)
        failing = asyncio.ensure_future(runner.run(calls("busy", fail=True)))
        keeping = asyncio.ensure_future(runner.run(calls("busy", fail=False)))
        (result,) = await failing  # its slot went to the other when it paused
        assert (result.failure, result.attempts) == ("fault", 1)
        assert "no free slot for another attempt within 0.3 seconds" in result.content
        patient = asyncio.ensure_future(runner.run(calls("busy", fail=True)))
        asyncio.get_running_loop().call_later(0.35, release.set)
        await keeping
        (result,) = await patient
        assert result.attempts > 2

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_pause_before_a_retry_takes_no_slot():
    seen = []

    @tool
    async def look(key: str) -> str:
        """Look up.

        Args:
            key: What.
        """
        seen.append(key)
        if seen == ["a"]:
            raise OSError("down")
        return key

    async def main():
        policy = ToolPolicy(concurrency=1, retries=1, backoff=0.01)
        runner = ToolRunner([look], default_policy=policy)
        both = await asyncio.gather(
            runner.run(calls("look", key="a")), runner.run(calls("look", key="b"))
        )
        assert [o.content for (o,) in both] == ["a", "b"]
        assert seen == ["a", "b", "a"]

    asyncio.run(main())


# Slots, cancellation and what is left behind


@pytest.mark.parametrize("blocking", [False, True])
def test_concurrency_is_never_exceeded_over_episodes_and_event_loops(blocking):
    inside, most, lock = 0, 0, threading.Lock()

    def enter(step):
        nonlocal inside, most
        with lock:
            inside += step
            most = max(most, inside)

    @tool
    async def waiting() -> str:
        """Wait."""
        enter(1)
        await asyncio.sleep(0.001)
        enter(-1)
        return "done"

    @tool(name="waiting")
    def sleeping() -> str:
        """Sleep."""
        enter(1)
        time.sleep(0.001)
        enter(-1)
        return "done"

    tools = [sleeping if blocking else waiting]
    runner = ToolRunner(tools, default_policy=ToolPolicy(concurrency=3))
    ended = []

    async def episodes():
        return await asyncio.gather(*(runner.run(calls("waiting", 2)) for _ in range(15)))

    def loop():
        for _ in range(2):
            ended.extend(o for outcomes in asyncio.run(episodes()) for o in outcomes)

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [o.failure for o in ended] == [None] * 180
    assert most == 3


def test_an_episode_that_ends_early_frees_its_slot_and_its_place_in_the_line():
    async def main():
        started = asyncio.Event()

        @tool
        async def wait(forever: bool) -> str:
            """Wait.

            Args:
                forever: Or not.
            """
            if forever:
                started.set()
                await asyncio.Event().wait()
            return "done"

        runner = ToolRunner([wait], default_policy=ToolPolicy(concurrency=1))
        inside = asyncio.ensure_future(runner.run(calls("wait", forever=True)))
        await started.wait()
        in_line = asyncio.ensure_future(runner.run(calls("wait", forever=True)))
        await asyncio.sleep(0)
        in_line.cancel()
        inside.cancel()
        (result,) = await runner.run(calls("wait", forever=False))
        assert result.content == "done"

    asyncio.run(asyncio.wait_for(main(), 20))


STUBBORN = """
import asyncio
from agentr1.tools.base import tool
from agentr1.tools.policy import ToolPolicy
from agentr1.tools.runner import ToolRunner
from agentr1.types import ToolCall
@tool
async def stubborn() -> str:
    '''Never give up.'''
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue
runner = ToolRunner([stubborn], default_policy=ToolPolicy(timeout=0.01, concurrency=1))
async def main():
    outcomes = await runner.run([ToolCall(str(i), "stubborn", {}) for i in range(3)])
    print(*(o.failure for o in outcomes))
asyncio.run(main())
"""


def test_a_tool_that_ignores_cancellation_holds_up_neither_others_nor_the_end():
    done = subprocess.run(
        [sys.executable, "-c", STUBBORN], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout.split()) == (0, ["fault"] * 3), done.stderr
    assert done.stderr.count("'stubborn' ignores its cancellation") == 1


def test_an_abandoned_tool_may_clean_up_although_the_loop_ends():
    cleaned = []

    @tool
    async def careful() -> str:
        """Clean up."""
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            cleaned.append(True)
        return ""

    runner = ToolRunner([careful], default_policy=ToolPolicy(timeout=0.01))
    asyncio.run(runner.run(calls("careful")))
    assert cleaned == [True]


# Cache


@pytest.mark.parametrize("cache", [False, True])
def test_equal_calls_are_answered_by_one_result_only_where_asked_for(cache):
    ran = []

    class Keeping(Answering):
        parameters = {"properties": {"a": {}, "b": {}}}

        async def __call__(self, **arguments):
            ran.append(arguments)
            await asyncio.sleep(0)
            return self.answer

    tool = Keeping(ToolResult("found", reward=0.5))
    runner = ToolRunner([tool], default_policy=ToolPolicy(cache=cache))
    turn = [
        ToolCall("c0", "answering", {"a": 1, "b": [{"x": 1, "y": 2}]}),
        ToolCall("c1", "answering", {"b": [{"y": 2, "x": 1}], "a": 1}),  # the same, said otherwise
        ToolCall("c2", "answering", {"a": "1"}),  # another
    ]
    outcomes = [*asyncio.run(runner.run(turn)), *asyncio.run(runner.run(turn[:1]))]
    assert [o.call_id for o in outcomes] == ["c0", "c1", "c2", "c0"]
    assert [(o.content, o.reward, o.failure) for o in outcomes] == [("found", 0.5, None)] * 4
    assert [o.cached for o in outcomes] == ([False, True, False, True] if cache else [False] * 4)
    assert [o.attempts for o in outcomes] == ([1, 0, 1, 0] if cache else [1] * 4)
    assert [o.arguments for o in outcomes] == [c.arguments for c in [*turn, turn[0]]]
    assert len(ran) == (2 if cache else 4)


def test_a_fault_is_not_cached():
    tool = Answering(OSError("down"))
    runner = ToolRunner([tool], default_policy=ToolPolicy(cache=True))
    assert asyncio.run(runner.run(calls("answering")))[0].failure == "fault"
    tool.answer = "up again"
    assert asyncio.run(runner.run(calls("answering")))[0].content == "up again"


# Budgets


def test_calls_over_a_budget_are_refused_in_call_order_and_not_run():
    tools = [CountingTool(name="search"), CountingTool(name="read")]
    runner = ToolRunner(tools, {"search": ToolPolicy(max_calls=2)})
    episode = EpisodeCalls(max_calls=3)
    wrong = ToolCall("w", "search", {"key": 1})
    names = ["search", "search", "search", "read", "read"]
    asked = [ToolCall(f"c{i}", name, {"key": f"k{i}"}) for i, name in enumerate(names)]
    outcomes = asyncio.run(runner.run([wrong, *asked], episode))
    assert [o.failure for o in outcomes] == ["mistake", None, None, "mistake", None, "mistake"]
    assert "the budget of 2 calls of 'search' is used up" in outcomes[3].content
    assert "the budget of 3 tool calls is used up" in outcomes[5].content
    assert [tool.calls for tool in tools] == [["k0", "k1"], ["k3"]]
    (later,) = asyncio.run(runner.run(asked[:1], episode))
    assert later.failure == "mistake"
    (another,) = asyncio.run(runner.run(asked[:1], EpisodeCalls(max_calls=3)))
    assert another.failure is None


# Mistakes found before the call


def test_an_unknown_tool_lists_the_known_ones():
    runner = ToolRunner([add, Answering()])
    (result,) = asyncio.run(runner.run(calls("x" * 10_000)))
    assert result.failure == "mistake"
    assert "Known tools: add, answering." in result.content
    assert len(result.content) < 200


def test_a_malformed_call_is_answered_with_its_reason():
    call = MalformedCall("call_0", "<tool_call>", "not closed by </tool_call>")
    (result,) = asyncio.run(ToolRunner([add]).run([call]))
    assert (result.failure, result.name, dict(result.arguments)) == ("mistake", "", {})
    assert "not closed by </tool_call>" in result.content


@pytest.mark.parametrize(
    "arguments", [{}, {"a": "1"}, {"a": 1, "c": 2}, {"a": True}, {"a": None}, {"a": 1.5}]
)
def test_wrong_arguments_never_reach_the_tool(arguments):
    (result,) = asyncio.run(ToolRunner([add]).run(calls("add", **arguments)))
    assert result.failure == "mistake"
    assert "Expected add(a: integer, b?: integer)." in result.content
    assert "\n" not in result.content


def test_a_tool_cannot_change_the_record_of_its_call():
    class Emptying(Answering):
        parameters = {"properties": {"xs": {"type": "array"}}}

        async def __call__(self, xs):
            xs.clear()

    (call,) = calls("answering", xs=[1, 2])
    (result,) = asyncio.run(ToolRunner([Emptying()]).run([call]))
    assert result.failure is None
    assert call.arguments == {"xs": [1, 2]}


def test_a_tool_that_is_not_async_is_a_fault():
    class Plain(Answering):
        def __call__(self):
            return "text"

    (result,) = asyncio.run(ToolRunner([Plain()]).run(calls("answering")))
    assert result.failure == "fault"


def test_what_is_no_tool_or_not_unique_is_refused():
    with pytest.raises(TypeError, match="@tool"):
        ToolRunner([len])
    with pytest.raises(ValueError, match="different names"):
        ToolRunner([add, add])
    with pytest.raises(ValueError, match="unknown tools \\['sub'\\]"):
        ToolRunner([add], {"sub": ToolPolicy()})
