"""The finish tool takes an answer, and no empty one."""

import asyncio

import pytest

from agentr1.parsing import ANSWER_CALL, answer_text, render_call
from agentr1.tools.base import schema
from agentr1.tools.finish import answer
from agentr1.tools.runner import ToolRunner
from agentr1.types import ToolCall


def called(**arguments):
    (outcome,) = asyncio.run(ToolRunner([answer]).run([ToolCall("1", ANSWER_CALL, arguments)]))
    return outcome


def test_the_answer_is_what_the_call_holds():
    assert called(text=" Paris ").content == "Paris"
    assert answer_text(render_call(answer.name, {"text": " Paris "})) == "Paris"


@pytest.mark.parametrize("arguments", [{"text": ""}, {"text": " \n"}, {"text": 5}, {}])
def test_what_is_no_answer_is_the_policys_mistake(arguments):
    outcome = called(**arguments)
    assert outcome.failure == "mistake"
    assert "expected" in outcome.content.lower()


def test_its_schema_is_named_and_described():
    function = schema(answer)["function"]
    assert function["name"] == "answer"
    assert function["parameters"]["required"] == ["text"]
    assert "alone" in function["parameters"]["properties"]["text"]["description"]
