"""Calls are read exactly as written, or named as malformed at their place; nothing is lost."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentr1.parsing import (
    ANSWER_CALL,
    MAX_DEPTH,
    MalformedCall,
    answer_text,
    is_well_formed_answer,
    parse_turn,
    render_call,
)
from agentr1.types import ToolCall

CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Ada"}}\n</tool_call>'

THINK_TAGS = ("<think>", "</think>")
TAGS = ("<tool_call>", "</tool_call>", "<answer>", "</answer>", *THINK_TAGS)
PIECES = (*TAGS, CALL, '{"name": "a", "arguments": {}}', '"', "\\", "{", "}", "NaN", " ")
hostile_text = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=20).map("".join)
without_thinking = hostile_text.map(lambda text: text.replace("think>", ""))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(TAGS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def only(text: str) -> ToolCall | MalformedCall:
    (call,) = parse_turn(text).calls
    return call


def test_one_call_is_read():
    assert parse_turn(f"I look it up.\n{CALL}") == (
        type(parse_turn(""))("", "I look it up.", (ToolCall("call_0", "search", {"query": "Ada"}),))
    )


def test_render_is_what_the_qwen_template_writes():
    assert render_call("search", {"query": "Ada"}) == CALL
    assert render_call("search", {"query": "Zoë"}).count("Zoë") == 1


def test_calls_keep_their_order_and_broken_ones_their_place():
    turn = parse_turn(f"{CALL}<tool_call>{{</tool_call>x{CALL}", id_prefix="call_7")
    assert [call.id for call in turn.calls] == ["call_7_0", "call_7_1", "call_7_2"]
    assert [type(call) for call in turn.calls] == [ToolCall, MalformedCall, ToolCall]
    assert turn.content == "x"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"name": "search", "arguments": {"query": }}', "invalid JSON at character 42"),
        ('{"name": "search, "arguments": {}}', "invalid JSON at character"),
        ("", "invalid JSON at character 0"),
        ("[1]", "expected a JSON object"),
        ('"search"', "expected a JSON object"),
        ('{"arguments": {}}', '["arguments"]'),
        ('{"name": "search"}', '["name"]'),
        ('{"name": "search", "arguments": {}, "id": 1}', '"id"'),
        ('{"name": 3, "arguments": {}}', '"name" must be a non-empty string, got 3'),
        ('{"name": " ", "arguments": {}}', '"name" must be a non-empty string'),
        ('{"name": "search", "arguments": "{}"}', '"arguments" must be a JSON object'),
        ('{"name": "search", "arguments": null}', '"arguments" must be a JSON object'),
        ('{"name": "search", "arguments": {"x": NaN}}', "NaN is not a JSON value"),
        ('{"name": "search", "arguments": {"x": -Infinity}}', "-Infinity is not a JSON value"),
        ('{"name": "search", "arguments": {"x": 1e999}}', "out of range"),
        ('{"name": "search", "arguments": {"x": ' + "9" * 5000 + "}}", "out of range"),
        ('{"name": "search", "arguments": {"q": 1, "q": 2}}', "duplicate key"),
        ('{"name": "a", "name": "b", "arguments": {}}', "duplicate key"),
        ('{"name": "search", "arguments": {"q": "\\ud800"}}', "surrogate"),
        ('{"name": "a", "arguments": {"x": ' + "[" * 99 + "]" * 99 + "}}", "levels deep"),
        ("[" * 100_000, "levels deep"),
        ('{"name": "a", "arguments": {}} and more', "Extra data"),
        ("{'name': 'a', 'arguments': {}}", "invalid JSON at character 1"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(body, reason):
    call = only(f"<tool_call>{body}</tool_call>")
    assert isinstance(call, MalformedCall)
    assert reason in call.reason
    assert len(call.reason) < 300
    assert call.text == f"<tool_call>{body}</tool_call>"


def test_an_unclosed_call_is_malformed_even_if_its_json_is_complete():
    call = only('<tool_call>\n{"name": "a", "arguments": {}}')
    assert isinstance(call, MalformedCall)
    assert call.reason == "not closed by </tool_call>"


def test_an_unclosed_call_does_not_swallow_the_next_one():
    first, second = parse_turn(f'<tool_call>{{"name": "a\n{CALL}').calls
    assert isinstance(first, MalformedCall)
    assert second == ToolCall("call_1", "search", {"query": "Ada"})


def test_an_odd_quote_does_not_swallow_the_next_call():
    first, second = parse_turn(
        f'<tool_call>{{"name": "a, "arguments": {{}}}}</tool_call>{CALL}'
    ).calls
    assert isinstance(first, MalformedCall)
    assert isinstance(second, ToolCall)


def test_a_stray_closing_tag_is_a_malformed_call():
    call = only("text</tool_call>")
    assert isinstance(call, MalformedCall)
    assert "without <tool_call>" in call.reason


def test_calls_inside_thinking_are_not_calls():
    turn = parse_turn(f"<think>maybe {CALL}</think>Hello<think>b</think>")
    assert turn.calls == ()
    assert turn.content == "Hello"
    assert turn.thinking == f"maybe {CALL}b"


def test_unclosed_thinking_is_thinking_to_the_end():
    turn = parse_turn(f"a<think>b{CALL}")
    assert (turn.content, turn.calls) == ("a", ())
    assert turn.thinking.startswith("b<tool_call>")


def test_thinking_opened_by_the_template_is_all_before_the_closing_tag():
    turn = parse_turn(f"hm <tool_call> no {CALL} so</think>\n{CALL}answer")
    assert turn.thinking == f"hm <tool_call> no {CALL} so"
    assert turn.content == "answer"
    assert turn.calls == (ToolCall("call_0", "search", {"query": "Ada"}),)


def test_a_closing_tag_after_an_opened_block_is_plain_text():
    turn = parse_turn(f"<think>a</think>{CALL}</think>b")
    assert turn.thinking == "a"
    assert turn.content == "</think>b"
    assert len(turn.calls) == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("  42 ", "42"),
        ("so <answer> 42 </answer>.", "42"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("<answer>1</answer> no, <answer>2", "1"),
        ("<answer>1</answer> </answer>", "1"),
        ("<answer>42", "<answer>42"),
        ("</answer>42", "</answer>42"),
        ("<think><answer>1</answer></think>2", "2"),
        ("it is 1</think><answer>2</answer>", "2"),
        (render_call("finish", {"x": "<answer>1</answer>"}) + "2", "2"),
        ("", ""),
    ],
)
def test_the_answer_is_the_last_answer_block_or_else_the_content(text, answer):
    assert answer_text(text) == answer


def answering(**arguments):
    return render_call(ANSWER_CALL, arguments)


SEARCH = render_call("search", {"query": "<answer>3</answer>"})


@pytest.mark.parametrize(
    ("text", "answer", "well_formed"),
    [
        (answering(text=" 42 "), "42", True),
        ("<think>41</think>So " + answering(text="42"), "42", True),
        (SEARCH + answering(text="42"), "42", True),
        (answering(text="42") + SEARCH, "42", False),  # something comes behind it
        (answering(text="1") + answering(text="42"), "42", False),
        (answering(text="42") + answering(text=""), "42", False),
        ("<answer>1</answer>" + answering(text="42"), "42", True),
        ("<answer>1</answer>" + answering(text=""), "1", False),
        ("<answer>1</answer>" + answering(text=5), "1", False),
        (answering(), "", False),
        (SEARCH, "", False),
        ("<answer>42</answer>", "42", True),
        ("It is <answer> 42 </answer>\n", "42", True),
        ("<think><answer>1</answer></think><answer>42</answer>", "42", True),
        ("<answer>42</answer>.", "42", False),
        ("<answer>1</answer><answer>42</answer>", "42", False),
        ("<answer></answer>", "", False),
        ("<answer> </answer>", "", False),
        ("</answer>42<answer>", "</answer>42<answer>", False),
        ("42", "42", False),
        ("", "", False),
    ],
)
def test_an_answer_is_read_from_both_notations_and_its_form_is_told(text, answer, well_formed):
    assert answer_text(text) == answer
    assert is_well_formed_answer(text) is well_formed


@settings(deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.dictionaries(st.text(), json_values, max_size=3))
def test_every_rendered_call_is_read_back(name, arguments):
    text = f"{render_call(name, arguments)}\n{render_call(name, arguments)}"
    turn = parse_turn(text)
    assert [type(call) for call in turn.calls] == [ToolCall, ToolCall]
    assert {call.name for call in turn.calls} == {name}
    assert all(call.arguments == json.loads(json.dumps(arguments)) for call in turn.calls)
    assert (turn.content, turn.thinking) == ("", "")


@settings(deadline=None)
@given(hostile_text)
def test_parsing_never_raises_and_numbers_the_calls(text):
    turn = parse_turn(text, id_prefix="c")
    assert [call.id for call in turn.calls] == [f"c_{i}" for i in range(len(turn.calls))]
    assert isinstance(answer_text(text), str)


@settings(deadline=None)
@given(without_thinking)
def test_every_tag_outside_thinking_belongs_to_a_call(text):
    rest = text
    for call in parse_turn(text).calls:
        if isinstance(call, MalformedCall):
            before, _, rest = rest.partition(call.text)
            assert call.text.count("<tool_call>") == call.text.startswith("<tool_call>")
        else:
            before, _, rest = rest.partition("<tool_call>")
            rest = rest.partition("</tool_call>")[2]
        assert "tool_call>" not in before
    assert "tool_call>" not in rest


@settings(deadline=None)
@given(hostile_text.map(lambda text: text.replace("</think>", "")), without_thinking)
def test_a_thinking_block_changes_nothing_about_what_follows(thought, text):
    plain = parse_turn(text)
    assert parse_turn(f"<think>{thought}</think>{text}").calls == plain.calls
    opened_by_template = thought.replace("<think>", "").replace("<tool_call>", "")
    assert parse_turn(f"{opened_by_template}</think>{text}").calls == plain.calls


@pytest.mark.parametrize(
    "unit",
    ["<tool_call>", '<tool_call>["', '<tool_call>"\\"', "<think></think>", "</think>", "<answer>"],
)
def test_hostile_text_takes_linear_time(unit):
    text = unit * (500_000 // len(unit))
    start = time.perf_counter()
    answer_text(text)
    # Linear is under half a second here; quadratic would be minutes.
    assert time.perf_counter() - start < 10


def test_the_deepest_allowed_call_is_read():
    inner = MAX_DEPTH - 3
    body = '{"name": "a", "arguments": {"x": ' + "[" * inner + "]" * inner + "}}"
    assert isinstance(only(f"<tool_call>{body}</tool_call>"), ToolCall)
