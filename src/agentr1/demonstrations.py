"""From a row with supporting titles to a conversation that finds them: what `agentr1 sft` imitates.

Layer 3, beside `rollout.py`. Plays a row as somebody would who knows which passages matter, but
asks only for what stands in the question or in a passage already shown; `queries.py` is that rule.
The recipe's own environment answers, so a demonstration reads as a rollout does, distractors
included. Knows messages and never tokens; its caller is `demonstrate.py`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from agentr1.envs.base import EnvFactory
from agentr1.envs.tool_env import ToolEnv
from agentr1.parsing import answer_text, render_call
from agentr1.queries import following_queries
from agentr1.rewards import (
    cover_exact_match,
    exact_match,
    gold_answers,
    normalize_answer,
    passages_in,
    titles_shown,
)
from agentr1.tools.runner import ToolRunner
from agentr1.types import Message, Row, ToolCall

QUERIES_TRIED = 12
"""Queries tried for one turn; the first that shows a new supporting passage is the one written."""


class Dropped(enum.StrEnum):
    """Why a row gave no demonstration."""

    NOT_TRAIN = "its official split is not train"
    IN_TEST = "its question stands in dev or test"
    NO_TITLES = "it has no supporting titles"
    NOT_FOUND = "a supporting passage was not found"
    TOO_LONG = "it needs more turns than allowed"
    NO_ANSWER = "its answer stands in no passage shown"
    NOT_ACCEPTED = "the environment did not play it to the answer"


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One conversation, and the row it answers.

    Attributes:
        row_id: of the row.
        messages: in the Hugging Face form.
        searches: turns before the answer.
    """

    row_id: str
    messages: list[dict[str, Any]]
    searches: int


@dataclasses.dataclass(frozen=True)
class Demonstrator:
    """What all rows of a recipe are demonstrated with; `demonstrator` makes one.

    Attributes:
        make_env: the recipe's environments.
        runner: their tools, to try queries with.
        search: name of the search tool.
        max_searches: turns before the answer.
        think: write a sentence of thinking before each action.
    """

    make_env: EnvFactory
    runner: ToolRunner
    search: str
    max_searches: int
    think: bool = False


class _Found(NamedTuple):
    """A query that showed something new, and all that was shown for it."""

    query: str
    result: str


def demonstrator(make_env: EnvFactory, max_searches: int, think: bool = False) -> Demonstrator:
    """Look at a recipe's environment for what demonstrations need of it.

    Raises:
        ValueError: it is no `ToolEnv`, or has not exactly one search tool.
    """
    env = _tool_env(make_env)
    names = [tool.name for tool in env.runner.tools]
    searches = [
        t.name for t in env.runner.tools if list(t.parameters.get("required", ())) == ["query"]
    ]
    if len(searches) != 1:
        raise ValueError(
            f"of the tools {names} there are {searches} with the one required argument `query`, "
            "expected one search tool, such as agentr1.tools.search.Search.from_corpus"
        )
    return Demonstrator(make_env, env.runner, searches[0], max_searches, think)


async def demonstration(row: Row, how: Demonstrator) -> Demonstration | Dropped:
    """One row's conversation, or why there is none."""
    titles: set[str] = set(row.get("supporting_titles") or ())
    if not titles:
        return Dropped.NO_TITLES
    path = await _search_path(row, titles, how)
    if isinstance(path, Dropped):
        return path
    shown = "\n".join(passage for found in path for passage in passages_in(found.result))
    answers = gold_answers(row)
    closed = [answer for answer in answers if normalize_answer(answer) in ("yes", "no")]
    visible = [answer for answer in answers if cover_exact_match(shown, [answer])]
    if not closed and not visible:
        return Dropped.NO_ANSWER
    return await _played(row, path, (closed or visible)[0], how)


async def _search_path(row: Row, titles: set[str], how: Demonstrator) -> list[_Found] | Dropped:
    """Searches that show one supporting passage after the other."""
    path: list[_Found] = []
    asked: set[str] = set()
    seen: dict[str, None] = {}  # passages in the order they were shown
    missing = titles
    while missing:
        if len(path) == how.max_searches:
            return Dropped.TOO_LONG
        gold = [passage for passage in seen if titles_shown(titles, passage)]
        others = [passage for passage in seen if passage not in gold]
        queries = following_queries(str(row["question"]), gold, others, sorted(missing))
        found = None
        for query in _fresh(queries, asked):
            result = await _searched(query, how)
            if titles_shown(missing, result):
                found = _Found(query, result)
                break
        if found is None:
            return Dropped.NOT_FOUND
        path.append(found)
        seen |= dict.fromkeys(passages_in(found.result))
        missing = missing - titles_shown(missing, found.result)
    return path


def _fresh(queries: Iterator[str], asked: set[str]) -> Iterator[str]:
    """The first few queries that were not asked before."""
    tried = 0
    for query in queries:
        if query.strip() and plain(query) not in asked and tried < QUERIES_TRIED:
            asked.add(plain(query))
            tried += 1
            yield query


async def _searched(query: str, how: Demonstrator) -> str:
    """What the search tool shows for a query, tried outside any episode."""
    (outcome,) = await how.runner.run([ToolCall("try", how.search, {"query": query})])
    if outcome.failure == "fault":
        raise RuntimeError(f"the search tool failed on {query!r}: {outcome.content}")
    return outcome.content if outcome.failure is None else ""


async def _played(
    row: Row, path: Sequence[_Found], answer: str, how: Demonstrator
) -> Demonstration | Dropped:
    """The episode as the recipe's environment plays it."""
    env = _tool_env(how.make_env)
    try:
        messages = [_as_record(message) for message in await env.reset(row)]
        for found in path:
            thought = _thought(f"I need to find {found.query}.", how)
            action = _calling(thought, how.search, {"query": found.query})
            result = await env.step(Message("assistant", _text(action)))
            shown = "\n".join(message.content for message in result.observation)
            if found.result not in shown:  # a limit of the environment's, or its end
                return Dropped.NOT_ACCEPTED
            messages += [action, *map(_as_record, result.observation)]
        action = _answering(env, _thought("The passages tell the answer.", how), answer)
        result = await env.step(Message("assistant", _text(action)))
    finally:
        await env.close()
    if not result.terminated or not exact_match(answer_text(_text(action)), [answer]):
        return Dropped.NOT_ACCEPTED
    return Demonstration(str(row.get("id", "?")), [*messages, action], len(path))


def _answering(env: ToolEnv, thought: str, answer: str) -> dict[str, Any]:
    """The last turn, in the way the environment asks for."""
    if env.finish_tool is not None:
        return _calling(thought, env.finish_tool, {_argument(env): answer})
    tagged = "<answer>" in (env.system_prompt or "")
    said = f"<answer>{answer}</answer>" if tagged else answer
    return {"role": "assistant", "content": f"{thought}{said}"}


def _argument(env: ToolEnv) -> str:
    """The argument of the finish tool that takes the answer: its only required one."""
    tool = next(tool for tool in env.runner.tools if tool.name == env.finish_tool)
    required = list(tool.parameters.get("required", ()))
    if len(required) != 1:
        raise ValueError(
            f"the finish tool {env.finish_tool!r} requires {required}, expected one argument that "
            "takes the answer, as agentr1.tools.finish.answer has"
        )
    return str(required[0])


def _calling(thought: str, tool: str, arguments: dict[str, str]) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
    return {"role": "assistant", "content": thought.rstrip("\n"), "tool_calls": [call]}


def _text(action: dict[str, Any]) -> str:
    """An assistant message as the policy writes it."""
    calls = [call["function"] for call in action.get("tool_calls", ())]
    written = [render_call(call["name"], call["arguments"]) for call in calls]
    return "\n".join(part for part in (action["content"], *written) if part)


def _thought(text: str, how: Demonstrator) -> str:
    return f"<think>{text}</think>\n" if how.think else ""


def _as_record(message: Message) -> dict[str, Any]:
    named = {"name": message.name} if message.name else {}
    return {"role": message.role, **named, "content": message.content}


def plain(text: str) -> str:
    """A question or a query as it is compared with others."""
    return " ".join(text.casefold().split())


def _tool_env(make_env: EnvFactory) -> ToolEnv:
    env = make_env()
    if not isinstance(env, ToolEnv):
        raise ValueError(
            f"the recipe's environment is {type(env).__name__}, expected a ToolEnv such as "
            "agentr1.envs.multi_hop.MultiHopEnv, whose tools can be searched with"
        )
    return env
