"""A tool's result becomes harmless, bounded text, or is a fault."""

import asyncio
import time

import pytest

from agentr1.tools.policy import ToolPolicy
from agentr1.tools.runner import ToolRunner
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


def outcome(answer, **limits):
    """What a tool with this answer is taken to have said."""
    runner = ToolRunner([Answering(answer)], default_policy=ToolPolicy(**limits))
    (result,) = asyncio.run(runner.run([ToolCall("call", "answering", {})]))
    result.content.encode("utf-8")
    return result


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
