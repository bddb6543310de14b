"""A demonstration finds every supporting passage by queries that follow from what was shown."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentr1.codec import Codec
from agentr1.demonstrations import Demonstration, Dropped, demonstration, demonstrator
from agentr1.engines.base import Sampling
from agentr1.envs.few_shot import FewShot
from agentr1.envs.multi_hop import MultiHopEnv
from agentr1.envs.tool_env import ToolEnv
from agentr1.parsing import render_call
from agentr1.retrieval.base import Hit, Passage
from agentr1.retrieval.bm25 import Bm25Index
from agentr1.retrieval.gathering import Gathered
from agentr1.rewards import exact_match_reward, format_reward, new_supporting_title
from agentr1.rollout import Limits, rollout
from agentr1.sft import recorded
from agentr1.tools.finish import answer
from agentr1.tools.runner import ToolRunner
from agentr1.tools.search import Search
from agentr1.types import StopReason
from fakes import CountingTool, ScriptedPolicy

PASSAGES = [
    Passage("1", "Point Foundation", "It was founded by Stewart Brand."),
    Passage("2", "Point Pleasant", "It is a town in Ohio."),
    Passage("3", "Stewart Brand", "He is an American writer."),
    Passage("4", "Stewart Island", "It is south of New Zealand."),
    Passage("5", "Quay", "It is of stone."),
]
ROW: dict[str, Any] = {
    "id": "q",
    "question": "What nationality is the founder of Point Foundation?",
    "answers": ["American"],
    "supporting_titles": ["Stewart Brand", "Point Foundation"],
}
RETRIEVER = Gathered(Bm25Index(PASSAGES), in_thread=False)
RUNNER = ToolRunner([Search(RETRIEVER, k=2), answer])


def made(row: dict[str, Any] = ROW, searches: int = 3, think: bool = False, **settings: Any):
    how = demonstrator(lambda: MultiHopEnv(RUNNER, **settings), searches, think)
    return asyncio.run(demonstration(row, how))


def kept(*args: Any, **settings: Any) -> Demonstration:
    found = made(*args, **settings)
    assert isinstance(found, Demonstration), found
    return found


def queries(found: Demonstration) -> list[str]:
    calls = [call["function"] for m in found.messages for call in m.get("tool_calls", ())]
    return [call["arguments"]["query"] for call in calls if call["name"] == "search"]


def test_the_bridge_is_searched_for_only_after_it_was_shown():
    found = kept()
    assert queries(found) == ["Point Foundation", "Stewart Brand"]
    assert found.row_id == "q"
    assert found.searches == 2
    assert [m["role"] for m in found.messages] == [
        *("system", "user", "assistant", "tool", "assistant", "tool", "assistant"),
    ]
    assert found.messages[-1] == {"role": "assistant", "content": "<answer>American</answer>"}


def test_results_are_the_tools_own_with_their_distractors():
    found = kept()
    shown = [m["content"] for m in found.messages if m["role"] == "tool"]
    assert shown == [asyncio.run(Search(RETRIEVER, k=2)(query=query)) for query in queries(found)]
    assert "Point Pleasant: " in shown[0]


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("settings", [{}, {"finish_tool": "answer"}])
def test_it_is_an_episode_of_the_recipes_own_environment(
    settings: Any, think: bool, codec: Codec
) -> None:
    found = kept(settings and ROW or ROW, think=think, **settings)
    told = recorded(found.messages, codec)
    engine = ScriptedPolicy(codec, {"": [turn.message.content for turn in told.turns]})
    env = MultiHopEnv(RUNNER, process_rewards=[(new_supporting_title, 1.0)], **settings)
    limits = Limits(max_completion_length=4000)
    played = asyncio.run(
        rollout(ROW, env, codec, engine, limits=limits, sampling=Sampling(max_tokens=1))
    )
    assert played.stop_reason is StopReason.ENVIRONMENT
    assert exact_match_reward([played]) == [1.0]
    assert format_reward([played]) == [1.0]
    assert sum(played.process_rewards) == 1.0
    assert [m.content for m in played.messages] == [m.content for m in told.messages]
    assert all(turn.message.content.startswith("<think>") is think for turn in told.turns)


def test_an_answer_alone_where_neither_tags_nor_a_finish_tool_are_asked_for():
    found = kept(system_prompt="Reply with the answer alone.")
    assert found.messages[-1] == {"role": "assistant", "content": "American"}


def test_the_answer_that_was_shown_is_given_and_yes_or_no_need_not_be():
    assert (
        "American" in kept({**ROW, "answers": ["US-American", "American"]}).messages[-1]["content"]
    )
    assert "no" in kept({**ROW, "answers": ["no"]}).messages[-1]["content"]


def test_a_passage_found_by_the_way_is_not_searched_for_again():
    row = {**ROW, "question": "Is Point Pleasant older than Point Foundation?", "answers": ["no"]}
    found = kept({**row, "supporting_titles": ["Point Pleasant", "Point Foundation"]})
    assert queries(found) == ["Point Pleasant"]


@pytest.mark.parametrize(
    ("changes", "searches", "why"),
    [
        ({"supporting_titles": []}, 3, Dropped.NO_TITLES),
        ({"supporting_titles": None}, 3, Dropped.NO_TITLES),
        ({}, 1, Dropped.TOO_LONG),
        ({"answers": ["Swiss"]}, 3, Dropped.NO_ANSWER),
        ({"answers": ["America"]}, 3, Dropped.NO_ANSWER),  # whole words
        # "Quay" is in the corpus, but nothing that was seen leads to it.
        ({"supporting_titles": ["Point Foundation", "Quay"]}, 3, Dropped.NOT_FOUND),
        ({"supporting_titles": ["Point Foundation", "Not There"]}, 3, Dropped.NOT_FOUND),
    ],
)
def test_why_a_row_falls_out(changes: Any, searches: int, why: Dropped) -> None:
    assert made({**ROW, **changes}, searches=searches) is why


def test_a_row_whose_episode_the_environment_does_not_let_play_falls_out() -> None:
    assert made(max_calls=1) is Dropped.NOT_ACCEPTED


class Down:
    """A retriever that is gone."""

    async def find(self, query: str, k: int) -> list[Hit]:
        raise ConnectionError("nobody answers")


def test_a_search_that_fails_is_no_reason_to_drop_a_row() -> None:
    how = demonstrator(lambda: MultiHopEnv(ToolRunner([Search(Down())])), 3)
    with pytest.raises(
        RuntimeError, match=r"search tool failed on 'Point Foundation'.*nobody answers"
    ):
        asyncio.run(demonstration(ROW, how))


def test_environments_without_one_search_tool_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of the tools \['lookup'\] there are \[\]"):
        demonstrator(lambda: ToolEnv(ToolRunner([CountingTool()])), 3)
    with pytest.raises(ValueError, match="environment is FewShot, expected a ToolEnv"):
        demonstrator(lambda: FewShot(MultiHopEnv(RUNNER), ()), 3)


class Submit:
    """A finish tool that wants two things."""

    name = "submit"
    description = "Submit."
    parameters = {"type": "object", "properties": {}, "required": ["text", "why"]}

    async def __call__(self, text: str, why: str) -> str:
        return render_call(text, {"why": why})


def test_a_finish_tool_that_takes_more_than_an_answer_is_refused() -> None:
    runner = ToolRunner([Search(RETRIEVER, k=2), Submit()])
    how = demonstrator(lambda: MultiHopEnv(runner, finish_tool="submit"), 3)
    with pytest.raises(ValueError, match=r"'submit' requires \['text', 'why'\]"):
        asyncio.run(demonstration(ROW, how))
