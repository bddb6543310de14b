"""Calls of a turn run together, come back in order, and fail only as a mistake or a fault."""

import asyncio
import datetime
import enum
import logging
import subprocess
import sys
import threading
import time

import pytest

from agentr1.parsing import MalformedCall, parse_turn
from agentr1.tools.base import ToolError, ToolPolicy, ToolRunner, in_daemon_thread, schema, tool
from agentr1.types import ToolCall, ToolResult


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
from agentr1.tools.base import ToolPolicy, ToolRunner, tool
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


def test_a_fault_is_logged_once_per_kind_with_the_tools_name(caplog):
    tool = Answering(ValueError("down"))
    runner = ToolRunner([tool])
    with caplog.at_level(logging.WARNING):
        asyncio.run(runner.run(calls("answering", 3)))
        tool.answer = OSError("gone")
        asyncio.run(runner.run(calls("answering", 3)))
        tool.answer = ToolError("not a fault")
        asyncio.run(runner.run(calls("answering")))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all("'answering'" in message for message in messages)
    assert "ValueError" in messages[0]
    assert "OSError" in messages[1]


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


def test_arguments_arrive_as_the_types_of_the_hints():
    class Unit(enum.StrEnum):
        KELVIN = "K"

    @tool(name="convert")
    def function(day: datetime.date, unit: Unit) -> str:
        """Convert.

        Args:
            day: Day.
            unit: Unit.
        """
        return f"{type(day).__name__} {unit!r}"

    runner = ToolRunner([function])
    good = calls("convert", day="2024-02-29", unit="K")
    bad = calls("convert", day="2023-02-29", unit="K")
    right, wrong = asyncio.run(runner.run([*good, *bad]))
    assert right.content == "date <Unit.KELVIN: 'K'>"
    assert wrong.failure == "mistake"
    assert "'day'" in wrong.content


def test_a_tool_cannot_change_the_record_of_its_call():
    class Emptying(Answering):
        parameters = {"properties": {"xs": {"type": "array"}}}

        async def __call__(self, xs):
            xs.clear()

    (call,) = calls("answering", xs=[1, 2])
    (result,) = asyncio.run(ToolRunner([Emptying()]).run([call]))
    assert result.failure is None
    assert call.arguments == {"xs": [1, 2]}


# Results


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        ("text", "text"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        (ToolResult("paid"), "paid"),
        (ToolResult([{"type": "text", "text": "a"}]), "a"),
        ({"title": "Zoë", "n": 1}, '{"title": "Zoë", "n": 1}'),
        ([1, "a", None], '[1, "a", null]'),
        ((1, 2), "[1, 2]"),
        (3, "3"),
        (0, "0"),
        (False, "false"),
        (2.5, "2.5"),
        (b"caf\xc3\xa9", "café"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        ("a\x00b\x1b[31m\r\n\tc", "a\ufffdb\ufffd[31m\r\n\tc"),
        ("a\ud800b", "a\ufffdb"),
        ({"x": "\udcff"}, '{"x": "\ufffd"}'),
    ],
)
def test_a_result_becomes_harmless_text(answer, content):
    result = outcome(answer)
    assert (result.failure, result.content) == (None, content)


@pytest.mark.parametrize("answer", [None, "", " \n", b"", [], {}, ToolResult("")])
def test_nothing_returned_is_said(answer):
    result = outcome(answer)
    assert (result.failure, result.content) == (None, "The tool returned nothing.")


@pytest.mark.parametrize(
    "answer",
    [
        object(),
        {1, 2},
        {("a", "b"): 1},
        [object()],
        ToolResult("x", reward=float("nan")),
        ToolResult([{"type": "image", "image": b"png"}]),
        [{"type": "text", "text": 3}],
    ],
)
def test_a_result_without_a_text_form_is_a_fault(answer):
    assert outcome(answer).failure == "fault"


def test_a_tool_that_is_not_async_is_a_fault():
    class Plain(Answering):
        def __call__(self):
            return "text"

    (result,) = asyncio.run(ToolRunner([Plain()]).run(calls("answering")))
    assert result.failure == "fault"


def test_a_tool_may_pay_for_its_turn():
    assert outcome(ToolResult("x", reward=0.5)).reward == 0.5
    assert outcome(ToolResult("x")).reward == 0.0


def test_a_long_result_is_cut_with_a_note():
    assert outcome("x" * 120, max_chars=100).content == "x" * 100 + "\n[cut: 20 more characters]"
    assert outcome("x" * 100, max_chars=100).content == "x" * 100


def test_ten_megabytes_are_cheap():
    text = "x\x00" * 5_000_000
    start = time.perf_counter()
    result = outcome(text)
    assert time.perf_counter() - start < 0.5
    assert len(result.content) < 4100
    assert "[cut: 9996000 more characters]" in result.content


# Definitions


def test_the_schema_is_the_one_of_chat_templates():
    assert schema(add) == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "One."},
                    "b": {"type": "integer", "description": "Other."},
                },
                "required": ["a"],
            },
        },
    }
    assert add.function(2, 3) == 5


def test_a_definition_without_hint_is_refused_where_it_is_made():
    with pytest.raises(TypeError, match="no type hint for 'x'"):

        @tool
        def bare(x):
            """Do it.

            Args:
                x: Thing.
            """


def test_what_is_no_tool_or_not_unique_is_refused():
    with pytest.raises(TypeError, match="@tool"):
        ToolRunner([len])
    with pytest.raises(ValueError, match="different names"):
        ToolRunner([add, add])
    with pytest.raises(ValueError, match="unknown tools \\['sub'\\]"):
        ToolRunner([add], {"sub": ToolPolicy()})


@pytest.mark.parametrize("limits", [{"timeout": 0}, {"concurrency": -1}, {"max_chars": "4k"}])
def test_a_policy_needs_positive_limits(limits):
    with pytest.raises(ValueError, match=f"ToolPolicy.{next(iter(limits))} is"):
        ToolPolicy(**limits)


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
