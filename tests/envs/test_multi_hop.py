"""A multi-hop episode: searches, one of two ways to answer, and what is counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agentr1.codec import Codec
from agentr1.engines.base import Sampling
from agentr1.envs.check import check_env
from agentr1.envs.multi_hop import MultiHopEnv
from agentr1.envs.tool_env import ToolEnv
from agentr1.parsing import render_call
from agentr1.recipe import load_recipe
from agentr1.retrieval.base import Passage
from agentr1.retrieval.bm25 import Bm25Index
from agentr1.retrieval.gathering import Gathered
from agentr1.rewards import exact_match_reward, new_supporting_title, repeated_query, valid_call
from agentr1.rollout import Limits, rollout
from agentr1.task import build_task
from agentr1.tools.base import tool
from agentr1.tools.finish import answer
from agentr1.tools.runner import ToolRunner
from agentr1.tools.search import Search
from agentr1.types import Message, StepResult, Trajectory
from fakes import ScriptedPolicy

PASSAGES = [
    Passage("1", "Point Foundation", "was founded by Stewart Brand."),
    Passage("2", "Stewart Brand", "is an American writer."),
    Passage("3", "Point Pleasant", "is a town."),
]
ROW = {
    "id": "q",
    "question": "What nationality is the founder of Point Foundation?",
    "answers": ["American"],
    "supporting_titles": ["Point Foundation", "Stewart Brand"],
}


def search(query: str) -> str:
    return render_call("search", {"query": query})


def runner(*tools: Any) -> ToolRunner:
    retriever = Gathered(Bm25Index(PASSAGES), in_thread=False)
    return ToolRunner([Search(retriever, k=2), *tools])


def play(codec: Codec, texts: Sequence[str], row: Any = ROW, **settings: Any) -> Trajectory:
    env = MultiHopEnv(runner(*([answer] if "finish_tool" in settings else [])), **settings)
    engine = ScriptedPolicy(codec, {"": list(texts)})
    limits = Limits(max_completion_length=4000)
    played = rollout(row, env, codec, engine, limits=limits, sampling=Sampling(max_tokens=1))
    return asyncio.run(played)


def totals(played: Trajectory, *names: str) -> list[float]:
    return [sum(turn.info[name] for turn in played.turns) for name in names]


def test_searches_and_an_answer_in_tags(codec: Codec) -> None:
    texts = [search("Point Foundation"), search("Stewart Brand"), "<answer>American</answer>"]
    played = play(codec, texts)
    assert played.stop_reason.is_terminal
    assert exact_match_reward([played]) == [1.0]
    assert totals(played, "gold_found", "passages", "repeated_calls") == [1.0, 4.0, 0.0]
    assert [turn.info["gold_found"] for turn in played.turns] == [0.5, 0.5, 0.0]


def test_the_finish_tool_takes_the_answer(codec: Codec) -> None:
    texts = [
        search("Point Foundation"),
        render_call("answer", {"text": ""}),  # no answer: the episode goes on
        search("Stewart Brand") + render_call("answer", {"text": "Brand: American"}),
    ]
    row = {**ROW, "answers": ["Brand: American"]}
    played = play(codec, texts, row=row, finish_tool="answer")
    assert played.stop_reason.is_terminal
    assert len(played.turns) == 3
    assert exact_match_reward([played]) == [1.0]
    # What the tool says is no passage; what was found beside the answer counts.
    assert totals(played, "gold_found", "passages") == [1.0, 4.0]


def test_an_answer_without_its_form_still_ends_the_episode(codec: Codec) -> None:
    for settings in ({}, {"finish_tool": "answer"}):
        played = play(codec, ["American"], **settings)
        assert played.stop_reason.is_terminal
        assert exact_match_reward([played]) == [1.0]


def test_repeated_calls_are_counted_and_never_negative(codec: Codec) -> None:
    played = play(codec, [search("Ulm"), search(" ulm") + search("Ulm"), "American"])
    assert totals(played, "repeated_calls", "gold_found") == [2.0, 0.0]
    assert str(played.turns[0].info["repeated_calls"]) == "0.0"


def test_failed_calls_show_nothing_and_a_row_without_titles_has_none_to_find(codec: Codec) -> None:
    texts = [render_call("search", {"q": "Point Foundation"}), search("zzz"), "American"]
    assert totals(play(codec, texts), "passages", "gold_found") == [0.0, 0.0]
    bare = {name: value for name, value in ROW.items() if name != "supporting_titles"}
    played = play(codec, [search("Point Foundation"), "American"], row=bare)
    assert totals(played, "passages", "gold_found") == [2.0, 0.0]


def test_process_rewards_are_paid_as_in_any_tool_environment(codec: Codec) -> None:
    rewards = ((new_supporting_title, 0.5), (repeated_query, 0.1))
    twice = [search("Point Foundation"), search("Point Foundation"), "American"]
    assert play(codec, twice, process_rewards=rewards).process_rewards == (0.25, -0.1, 0.0)


def test_every_turn_reports_every_number_also_a_cut_one() -> None:
    env = MultiHopEnv(runner())

    async def steps() -> list[StepResult]:
        await env.reset(ROW)
        cut = Message("assistant", search("Ulm"), cut=True)
        return [await env.step(m) for m in (cut, Message("assistant", "  "))]

    for result in asyncio.run(steps()):
        assert {"gold_found", "passages", "repeated_calls", "cut", "calls"} <= result.info.keys()
        assert not result.terminated


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ({}, "<answer>", "call answer"),
        ({"finish_tool": "answer"}, "call answer", "<answer>"),
        ({"system_prompt": "Be brief."}, "Be brief.", "<answer>"),
        ({"system_prompt": "Be brief.", "finish_tool": "answer"}, "Be brief.", "call"),
    ],
)
def test_instructions_fit_the_way_of_answering(settings: Any, said: str, unsaid: str) -> None:
    env = MultiHopEnv(runner(answer), **settings)
    opening = asyncio.run(env.reset(ROW))
    assert [message.role for message in opening] == ["system", "user"]
    assert said in opening[0].content
    assert unsaid not in opening[0].content
    asyncio.run(check_env(lambda: MultiHopEnv(runner(answer), **settings), ROW))


def test_no_instructions_at_all_can_be_asked_for() -> None:
    opening = asyncio.run(MultiHopEnv(runner(), system_prompt="").reset(ROW))
    assert [message.role for message in opening] == ["user"]


RECIPE = """
dataset: {folder}
environment: agentr1.envs.multi_hop.MultiHopEnv
tools: [agentr1.tools.search.Search.from_corpus{tool}]
{finish}
rewards: [agentr1.agent_r1_rewards.paper, agentr1.agent_r1_rewards.legacy]
process_rewards: [agentr1.rewards.new_supporting_title]
metrics: [agentr1.rewards.exact_match_reward, agentr1.rewards.format_reward]
use_cpu: true
bf16: false
"""


@pytest.mark.parametrize("finish", ["", "answer"])
def test_a_recipe_names_it(tmp_path: Path, finish: str) -> None:
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(ROW) + "\n")
    lines = [json.dumps({"id": p.id, "title": p.title, "text": p.text}) for p in PASSAGES]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    text = RECIPE.format(
        folder=tmp_path,
        tool=", agentr1.tools.finish.answer" if finish else "",
        finish=f"finish_tool: {finish}" if finish else "",
    )
    (tmp_path / "r.yaml").write_text(text)
    task = build_task(load_recipe(str(tmp_path / "r.yaml")).arguments)
    env = task.env_factory()
    assert isinstance(env, MultiHopEnv)
    assert isinstance(env, ToolEnv)
    assert env.finish_tool == (finish or None)
    assert list(task.metrics) == ["exact_match", "format"]
    assert [reward.__name__ for reward in task.rewards] == ["paper", "legacy"]


def test_what_is_given_to_any_finish_tool_is_no_evidence(codec: Codec) -> None:
    @tool
    def submit(text: str) -> str:
        """Answer.

        Args:
            text: The answer.
        """
        return text

    row = {"id": "1", "question": "Who?", "answers": ["x"], "supporting_titles": ["Ed Wood"]}
    paid = [(new_supporting_title, 1.0), (valid_call, 0.25)]
    env = MultiHopEnv(ToolRunner([submit]), process_rewards=paid, finish_tool="submit")
    call = '<tool_call>{"name": "submit", "arguments": {"text": "Ed Wood: a director"}}</tool_call>'
    asyncio.run(env.reset(row))
    result = asyncio.run(env.step(Message("assistant", call)))
    assert result.terminated
    assert result.reward == 0.25
    assert (result.info["gold_found"], result.info["passages"]) == (0.0, 0.0)
