"""The two one-turn baselines: what they show, when they end, what counts as their answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agentr1.codec import Codec
from agentr1.engines.base import Sampling
from agentr1.envs.base import Env
from agentr1.envs.check import check_env
from agentr1.envs.one_shot import ANSWER_ALONE, CLOSED_BOOK, NAIVE_RAG, ClosedBookEnv, NaiveRagEnv
from agentr1.retrieval.base import Hit, Passage
from agentr1.retrieval.bm25 import Bm25Index
from agentr1.retrieval.gathering import Gathered
from agentr1.rewards import exact_match_reward
from agentr1.rollout import Limits, rollout
from agentr1.tools.search import Search
from agentr1.types import StopReason, Trajectory
from fakes import ScriptedPolicy

RETRIEVER = Gathered(
    Bm25Index(
        [
            Passage("1", "Ulm", "is a city\non the Danube."),
            Passage("2", "Ulm Minster", "is a church of Ulm, " + "high " * 50),
            Passage("3", "Bonn", "is a city."),
        ]
    ),
    in_thread=False,
)
ROW = {
    "id": "q",
    "question": "Where is Ulm Minster?",
    "answers": ["Ulm"],
    "supporting_titles": ["Ulm", "Danube"],
}
MAKERS: list[Callable[[], Env]] = [ClosedBookEnv, lambda: NaiveRagEnv(RETRIEVER, 2)]


def play(codec: Codec, env: Env, text: str, max_tokens: int | None = None) -> Trajectory:
    engine = ScriptedPolicy(codec, {"": [text]})
    limits = Limits(max_completion_length=2000, max_turn_tokens=max_tokens)
    played = rollout(ROW, env, codec, engine, limits=limits, sampling=Sampling(max_tokens=1))
    return asyncio.run(played)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<answer>Ulm</answer>", 1.0),
        ("Ulm", 1.0),  # counts as for a policy that searches
        ("In Ulm.", 0.0),
        ("<think>Bonn?</think>Ulm", 1.0),
        ("", 0.0),
    ],
)
def test_the_first_turn_is_the_answer(make: Any, text: str, value: float, codec: Codec) -> None:
    played = play(codec, make(), text)
    assert played.stop_reason is StopReason.ENVIRONMENT
    assert exact_match_reward([played]) == [value]


@pytest.mark.parametrize("make", MAKERS)
def test_a_turn_that_is_cut_is_no_answer(make: Any, codec: Codec) -> None:
    played = play(codec, make(), "<answer>Ulm</answer> and more of that", max_tokens=25)
    assert "</answer>" in played.final_text
    assert played.stop_reason is StopReason.ENVIRONMENT_LIMIT
    assert exact_match_reward([played]) == [0.0]
    assert played.turns[0].info["cut"] == 1.0


@pytest.mark.parametrize("make", MAKERS)
def test_they_keep_the_contract_and_show_no_tools(make: Any) -> None:
    asyncio.run(check_env(make, ROW))
    assert list(make().tool_schemas) == []


def test_closed_book_shows_the_question_alone(codec: Codec) -> None:
    opening = asyncio.run(ClosedBookEnv().reset(ROW))
    assert [(m.role, m.content) for m in opening] == [
        ("system", CLOSED_BOOK),
        ("user", ROW["question"]),
    ]
    assert play(codec, ClosedBookEnv(), "x").turns[0].info == {
        "passages": 0.0,
        "gold_found": 0.0,
        "cut": 0.0,
    }


@pytest.mark.parametrize("passage_chars", [None, 30])
def test_naive_rag_shows_what_the_search_tool_shows(passage_chars: int | None) -> None:
    env = NaiveRagEnv(RETRIEVER, 2, passage_chars=passage_chars)
    system, user = asyncio.run(env.reset(ROW))
    tool = Search(RETRIEVER, k=2, passage_chars=passage_chars)
    shown = asyncio.run(tool(query=str(ROW["question"])))
    assert system.content == NAIVE_RAG
    assert user.content == f"{shown}\n\n{ROW['question']} {ANSWER_ALONE}"
    assert "Ulm: is a city on the Danube." in shown


def test_naive_rag_counts_what_it_showed(codec: Codec) -> None:
    info = play(codec, NaiveRagEnv(RETRIEVER, 2), "x").turns[0].info
    assert info["passages"] == 2.0
    assert info["gold_found"] == 0.5
    info = play(codec, NaiveRagEnv(Nothing(), 2), "x").turns[0].info
    assert info["passages"] == info["gold_found"] == 0.0


class Nothing:
    """A retriever without passages."""

    async def find(self, query: str, k: int) -> list[Hit]:
        return []


class Broken:
    """A retriever that is down."""

    async def find(self, query: str, k: int) -> list[Hit]:
        raise ConnectionError("nobody answers")


def test_nothing_found_is_said_as_the_tool_says_it() -> None:
    user = asyncio.run(NaiveRagEnv(Nothing(), 2, "").reset(ROW))[-1]
    assert user.content == f"{asyncio.run(Search(Nothing())(query='x'))}\n\n{ROW['question']}"


def test_a_retriever_that_fails_fails_the_episode() -> None:
    with pytest.raises(ConnectionError, match="nobody answers"):
        asyncio.run(NaiveRagEnv(Broken(), 2).reset(ROW))


@pytest.mark.parametrize("make", [ClosedBookEnv, lambda prompt: NaiveRagEnv(RETRIEVER, 1, prompt)])
def test_instructions_can_be_others_or_none(make: Any) -> None:
    assert asyncio.run(make("Be brief.").reset(ROW))[0].content == "Be brief."
    assert [m.role for m in asyncio.run(make("").reset(ROW))] == ["user"]


def test_a_row_without_a_question_is_refused() -> None:
    with pytest.raises(ValueError, match="row 'q' has columns .*expected 'question'"):
        asyncio.run(ClosedBookEnv().reset({"id": "q", "prompt": []}))
