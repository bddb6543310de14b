"""Assistant text → thinking, content and tool calls, in the Hermes/Qwen `<tool_call>` format.

Layer 1, called by tool environments on what the policy sampled, never on text from a tool.
It must not know which tools exist: whether a name or an argument is right is decided where the
call is run. A call that cannot be read becomes a `MalformedCall` at its place among the others;
nothing is repaired and nothing is dropped, because a repaired call would be rewarded as if the
policy had written it. Every function takes time linear in its input, however hostile.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from agentr1.types import ToolCall

MAX_DEPTH = 64
"""Nesting allowed inside a call: deeper values overflow the stack of whoever copies them later."""

ANSWER_CALL = "answer"
"""A call of this name gives the final answer in `text`; `<answer>...</answer>` is the other way."""

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_TAG = re.compile(r"</?(?:tool_call|think)>")
_OUTSIDE_STRING = re.compile(r'[^"<\\]*')
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


@dataclasses.dataclass(frozen=True, slots=True)
class MalformedCall:
    """A call the policy tried to make and that cannot be read.

    Attributes:
        id: as in `ToolCall`.
        text: what the policy wrote, tags included.
        reason: what is wrong with it, in words for the model.
    """

    id: str
    text: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class ParsedTurn:
    """One assistant message taken apart.

    Attributes:
        thinking: the inside of all thinking, stripped.
        content: what is neither thinking nor part of a call, stripped.
        calls: every call in the order it was written, readable or not.
    """

    thinking: str
    content: str
    calls: tuple[ToolCall | MalformedCall, ...]


def parse_turn(text: str, id_prefix: str = "call") -> ParsedTurn:
    """Split one assistant message into thinking, content and calls; never raises.

    A tag inside a JSON string of a readable call belongs to the call. `</think>` with no
    `<think>` before it closes a block that the chat template opened: all before it is thinking.

    Args:
        text: the message as the policy wrote it.
        id_prefix: the calls are named `{id_prefix}_0`, `{id_prefix}_1`, ...
    """
    thinking: list[str] = []
    content: list[str] = []
    found: list[tuple[str, dict[str, Any] | str]] = []  # (raw text, JSON object or reason)
    position = unsettled = 0  # a later stray </think> turns text[unsettled:] into thinking
    while tag := _TAG.search(text, position):
        content.append(text[position : tag.start()])
        position = tag.end()
        if tag.group() == _OPEN:
            raw, outcome = _read_call(text, tag.start())
            found.append((raw, outcome))
            position = tag.start() + len(raw)
        elif tag.group() == _CLOSE:
            found.append((_CLOSE, f"{_CLOSE} without {_OPEN} before it"))
        elif tag.group() == "<think>":
            end = text.find("</think>", position)
            thinking.append(text[position : end if end >= 0 else len(text)])
            position = end + len("</think>") if end >= 0 else len(text)
            unsettled = -1
        elif unsettled >= 0:
            thinking.append(text[unsettled : tag.start()])
            unsettled = position
            content.clear()
            found.clear()
        else:
            content.append(tag.group())
    content.append(text[position:])
    return ParsedTurn(
        thinking="".join(thinking).strip(),
        content="".join(content).strip(),
        calls=tuple(_build(f"{id_prefix}_{i}", *pair) for i, pair in enumerate(found)),
    )


def render_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Write one call exactly as the Qwen2.5 chat template does."""
    body = json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False)
    return f"{_OPEN}\n{body}\n{_CLOSE}"


def answer_text(text: str) -> str:
    """The policy's final answer, in whichever notation it stands in the text.

    The `text` of the last call `answer`, else the last `<answer>...</answer>`, else the whole
    content.
    """
    turn = parse_turn(text)
    if called := _called_answers(turn):
        return called[-1]
    content = turn.content
    start = content.rfind("<answer>", 0, max(content.rfind("</answer>"), 0))
    if start < 0:
        return content
    start += len("<answer>")
    return content[start : content.find("</answer>", start)].strip()


def is_well_formed_answer(text: str) -> bool:
    """Whether the text ends with one answer that is not empty, in one of the two notations.

    One call `answer` and no call behind it, or one `<answer>...</answer>` and nothing behind it.
    """
    turn = parse_turn(text)
    if turn.calls:
        answers = [_is_answer(call) for call in turn.calls]
        return answers[-1] and sum(answers) == 1 and _called_answers(turn) != []
    tags = [turn.content.count(tag) for tag in ("<answer>", "</answer>")]
    return tags == [1, 1] and turn.content.endswith("</answer>") and answer_text(text) != ""


def _is_answer(call: ToolCall | MalformedCall) -> bool:
    return isinstance(call, ToolCall) and call.name == ANSWER_CALL


def _called_answers(turn: ParsedTurn) -> list[str]:
    """What the turn's calls `answer` give, those with an empty text left out."""
    calls = [call for call in turn.calls if isinstance(call, ToolCall) and _is_answer(call)]
    texts = [call.arguments.get("text") for call in calls]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _build(call_id: str, raw: str, outcome: dict[str, Any] | str) -> ToolCall | MalformedCall:
    if isinstance(outcome, str):
        return MalformedCall(id=call_id, text=raw, reason=outcome)
    return ToolCall(id=call_id, name=outcome["name"], arguments=outcome["arguments"])


def _read_call(text: str, start: int) -> tuple[str, dict[str, Any] | str]:
    """The raw text of the call that opens at `start`, and its JSON object or what is wrong."""
    inside = start + len(_OPEN)
    # Two scans from different openers can never both run past a third one, since one of them is
    # inside a string there and the other is not: this is why the whole parse stays linear.
    end = _end_of_json(text, inside)
    if text.startswith(_CLOSE, end):
        outcome = _read_object(text[inside:end])
        if isinstance(outcome, dict):
            return text[start : end + len(_CLOSE)], outcome
    # Broken JSON may have unbalanced quotes, so only the plain next tag bounds the damage.
    tag = _TAG.search(text, inside)
    if tag is None or tag.group() != _CLOSE:
        return text[start : tag.start() if tag else len(text)], f"not closed by {_CLOSE}"
    return text[start : tag.end()], _read_object(text[inside : tag.start()])


def _end_of_json(text: str, position: int) -> int:
    """The first place outside a JSON string that no JSON can contain: `<`, backslash, the end."""
    while True:
        gap = _OUTSIDE_STRING.match(text, position)
        position = gap.end() if gap else position
        string = _STRING.match(text, position)
        if string is None:
            return position
        position = string.end()


def _read_object(body: str) -> dict[str, Any] | str:
    """The call's JSON object with exactly "name" and "arguments", or what is wrong with it."""
    try:
        value = json.loads(
            body,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_number,
            parse_int=_number,
        )
        json.dumps(value, ensure_ascii=False).encode()
        return _checked(value)
    except json.JSONDecodeError as error:
        return f"invalid JSON at character {error.pos}: {error.msg}"
    except UnicodeEncodeError:
        return "invalid JSON: half of a surrogate pair"
    except RecursionError:
        return f"nested more than {MAX_DEPTH} levels deep"
    except ValueError as error:
        return str(error)


def _checked(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        got = f"the keys {_clip(list(value))}" if isinstance(value, dict) else _clip(value)
        raise ValueError(f'expected a JSON object with "name" and "arguments" alone, got {got}')
    if not isinstance(value["name"], str) or not value["name"].strip():
        raise ValueError(f'"name" must be a non-empty string, got {_clip(value["name"])}')
    if not isinstance(value["arguments"], dict):
        raise ValueError(f'"arguments" must be a JSON object, got {_clip(value["arguments"])}')
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key among {_clip(keys)}")
    return unique


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _number(literal: str) -> int | float:
    if not math.isfinite(float(literal)):
        raise ValueError(f"the number {_clip(literal)} is out of range")
    return int(literal) if literal.lstrip("-").isdigit() else float(literal)


def _clip(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
