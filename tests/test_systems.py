"""Baselines: each is what its name says, and gets what the policy may use, no more."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.envs.one_shot import NaiveRagEnv
from agentr1.recipe import Recipe
from agentr1.retrieval.base import Hit, Passage
from agentr1.scoring import evaluate_rows
from agentr1.systems import (
    SYSTEMS,
    Budget,
    WithinBudget,
    budget_of,
    choose,
    load_weights,
    player,
    prepare,
)
from agentr1.task import Task
from agentr1.tools.policy import ToolPolicy
from agentr1.tools.runner import ToolRunner
from agentr1.tools.search import Search, result_line
from agentr1.types import ToolCall

HERE = ["--use_cpu", "true", "--train_limit", "4", "--dev_limit", "4", "--test_limit", "4"]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where was Ada born?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "search", "arguments": {"query": "Ada"}}}],
    },
    {"role": "tool", "name": "search", "content": "Ada: Born in Rome."},
    {"role": "assistant", "content": "Rome"},
]


def prepared(*overrides: str) -> tuple[Recipe, Task]:
    return prepare("quickstart", [*HERE, *overrides])


@pytest.fixture
def shown(tmp_path: Path) -> list[str]:
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(3)))
    return ["--demonstrations", str(path)]


def names(*baselines: str, overrides: Sequence[str] = (), **models: str) -> list[str]:
    systems, _ = choose(*prepared(*overrides), baselines, **models)
    return [system.name for system in systems]


def test_all_is_every_baseline_that_can_be_played_and_says_what_it_leaves_out(
    shown: list[str],
) -> None:
    recipe, task = prepared()
    systems, left_out = choose(recipe, task, ["all"])
    assert [s.name for s in systems] == ["policy", "closed_book", "naive_rag", "base_tool_call"]
    assert len(left_out) == 2
    assert "few_shot is left out" in left_out[0]
    assert "--demonstrations FILE" in left_out[0]
    assert "cold_start is left out" in left_out[1]
    every = names("all", overrides=shown, cold_start="data/quickstart/policy")
    assert every == list(SYSTEMS)
    assert names() == ["policy"]
    assert names("naive_rag", "closed_book") == ["policy", "closed_book", "naive_rag"]


def test_untrained_is_the_base_model_where_the_recipe_starts_from_a_trained_one(
    tmp_path: Path, shown: list[str]
) -> None:
    trained, cold = tmp_path / "trained", tmp_path / "cold"
    for folder in (trained, cold):
        shutil.copytree("data/quickstart/policy", folder)
    task = prepared(
        *shown,
        *("--model_name_or_path", str(cold), "--base_model", "data/quickstart/policy"),
    )
    systems, _ = choose(*task, ["all"], policy=str(trained), cold_start=str(cold))
    untrained = {
        system.name for system in systems if system.source.path_or_id.endswith("start/policy")
    }
    assert {s.source.path_or_id for s in systems if s.name == "policy"} == {str(trained)}
    assert {s.source.path_or_id for s in systems if s.name == "cold_start"} == {str(cold)}
    assert untrained == {"closed_book", "naive_rag", "base_tool_call", "few_shot"}


@pytest.mark.parametrize(
    ("baseline", "overrides", "message"),
    [
        ("cold_start", [], "cold_start: it needs the model of a supervised .*--cold-start MODEL"),
        ("few_shot", [], "few_shot: it shows the first 2 conversations .* names none"),
        (
            "naive_rag",
            ["--tools", "agentr1.tools.calculator.calculator"],
            "naive_rag: it needs agentr1.tools.search.Search among",
        ),
        ("rag", [], r"unknown \['rag'\], expected all, or some of \['closed_book', 'naive_rag'"),
    ],
)
def test_a_baseline_that_is_named_and_cannot_be_played_is_a_mistake(
    baseline: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        names(baseline, overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], Budget(5, 384, 48, 8, 336, 16_000)),
        (["--max_turns", "1"], Budget(1, 384, 48, 2, 336, 4000)),
        (["--max_calls", "3"], Budget(5, 384, 48, 6, 336, 12_000)),
        (["--tool_max_calls", "2"], Budget(5, 384, 48, 4, 336, 8000)),
        (["--max_observation_tokens", "99"], Budget(5, 384, 48, 8, 99, 16_000)),
        (["--max_turn_tokens", "500"], Budget(5, 384, 384, 8, 0, 16_000)),
        (["--tool_max_chars", "70"], Budget(5, 384, 48, 8, 336, 280)),
    ],
)
def test_the_budget_is_what_the_policy_may_use(overrides: list[str], expected: Budget) -> None:
    recipe, _ = prepared(*overrides)
    assert budget_of(recipe) == expected
    assert f"{expected.passages} passages of {expected.passage_tokens} tokens" in str(expected)


class Fixed:
    """Finds the same passages for any query."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.hits = [Hit(Passage(str(i), "T", text), 1.0) for i, text in enumerate(texts)]

    async def find(self, query: str, k: int) -> list[Hit]:
        return self.hits[:k]


def words(text: str) -> int:
    return len(text.split())


def odd(text: str) -> int:
    """A count that a longer text may have less of, as a tokenizer's may."""
    return len(text) // 2 + len(text) % 3


@given(
    st.lists(st.text("ab \n", max_size=40), max_size=6),
    *(st.integers(0, 90), st.integers(0, 90), st.integers(1, 6)),
    *(st.sampled_from([len, odd, words]), st.sampled_from([None, 7])),
)
def test_the_best_passages_stay_and_the_first_that_does_not_fit_is_cut_to_the_room(
    texts: list[str], tokens: int, chars: int, k: int, count: Any, passage_chars: int | None
) -> None:
    fixed = Fixed(texts)
    search = Search(fixed, k, passage_chars)
    find = WithinBudget(search, Budget(1, 1, 1, k, tokens, chars), count).find
    lines = [f"{result_line(hit.passage)}\n" for hit in asyncio.run(find("q", k))]
    whole = [f"{result_line(hit.passage, passage_chars)}\n" for hit in fixed.hits[:k]]
    assert sum(map(len, lines)) <= chars
    assert sum(map(count, lines)) <= tokens
    if lines != whole:
        full = lines[: next(i for i, line in enumerate([*lines, ""]) if line != whole[i])]
        assert len(lines) - len(full) in (0, 1)
        more = whole[: len(full) + 1]
        assert sum(map(len, more)) > chars or sum(map(count, more)) > tokens
        if len(lines) > len(full):
            beginning = lines[-1].removesuffix(" ...\n")
            assert len(beginning) > len("T: ")
            assert more[-1].startswith(beginning)


@pytest.mark.parametrize("text", ["lorem ipsum " * 3334, "unbroken" * 5000])
def test_of_a_passage_longer_than_the_budget_naive_rag_is_shown_what_a_search_shows(
    text: str,
) -> None:
    search = Search(Fixed([text, "never seen"]), 2)
    recipe, _ = prepared("--max_turns", "2", "--max_completion_length", "20000")
    budget = budget_of(recipe)
    assert budget.passage_chars == recipe.arguments.tool_max_chars == 4000
    runner = ToolRunner([search], default_policy=ToolPolicy(max_chars=4000))
    (outcome,) = asyncio.run(runner.run([ToolCall("1", "search", {"query": "q"})]))
    policy_sees = outcome.content.rpartition("\n[cut: ")[0]
    env = NaiveRagEnv(WithinBudget(search, budget, len), 2)
    naive_sees = asyncio.run(env.reset({"question": "q"}))[-1].content
    beginning = naive_sees.rpartition(" ...")[0]
    assert policy_sees.startswith(beginning)
    assert len(policy_sees) - 20 <= len(beginning) <= 4000


def test_no_budget_is_exceeded_in_the_tokens_of_a_tokenizer() -> None:
    recipe, task = prepared()
    tokenizer = load_weights(choose(recipe, task)[0][0].source, recipe).tokenizer

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    texts = ["Ada <tool_call> \u00e9\u00e9 was\n born, 1815.", "  x" * 9, "12345 " * 8, "...!"]
    for room in range(0, 90, 3):
        budget = Budget(1, 1, 1, 4, room, 1000)
        for first in range(len(texts)):
            fixed = Fixed([*texts[first:], *texts[:first]])
            within = WithinBudget(Search(fixed, 4), budget, count)
            shown = asyncio.run(Search(within, 4)(query="q"))
            assert shown == "No results." or count(shown) <= room


@pytest.mark.parametrize("chars", [None, 5, 9, 40])
def test_passages_are_cut_as_the_search_tool_cuts_them(chars: int | None) -> None:
    fixed = Fixed(["one two three four", "unbroken" * 4, "short", "a\nb c d e f"])
    search = Search(fixed, 4, chars)
    within = WithinBudget(search, Budget(1, 1, 1, 4, 10_000, 10_000), len)
    assert asyncio.run(Search(within, 4)(query="q")) == asyncio.run(search(query="q"))


def opening(name: str, *overrides: str) -> tuple[list[str], Any]:
    recipe, task = prepared(*overrides)
    ready = player(name, recipe, task, load_weights(choose(recipe, task)[0][0].source, recipe))
    messages = asyncio.run(ready.task.env_factory().reset(task.test[0]))
    return [message.content for message in messages], ready


def test_closed_book_is_the_question_alone_and_one_answer() -> None:
    texts, ready = opening("closed_book")
    assert texts[-1] == ready.task.test[0]["question"]
    assert (ready.limits.max_turns, ready.limits.max_turn_tokens) == (1, 48)
    assert ready.codec.tools == []


@pytest.mark.parametrize("name", ["closed_book", "naive_rag"])
def test_an_answer_that_is_cut_counts_with_all_its_numbers(name: str) -> None:
    _, ready = opening(name, "--max_turn_tokens", "2")
    (played,) = evaluate_rows(
        ready.task.test[:1],
        *(ready.task.env_factory, ready.codec, ready.engine),
        limits=ready.limits,
        metrics=ready.task.metrics,
    )
    (turn,) = played.trajectory.turns
    assert len(turn.action_ids) == 2
    assert turn.info["cut"] == 1.0
    assert turn.info["passages"] == (8.0 if name == "naive_rag" else 0.0)
    assert played.values["exact_match"] == 0.0


def test_naive_rag_is_shown_the_first_passages_of_the_recipes_search() -> None:
    texts, ready = opening("naive_rag")
    question = ready.task.test[0]["question"]
    lines = texts[-1].splitlines()
    assert lines[-1].startswith(question)
    _, task = prepared("--search_top_k", "8")
    tools: Any = task.env_factory()
    found = asyncio.run(tools.runner.tools[0](query=question)).splitlines()
    assert lines[:-2] == found
    assert len(found) == 8
    fewer, _ = opening("naive_rag", "--max_observation_tokens", "60")
    assert 0 < len(fewer[-1].splitlines()) < len(lines)
    assert lines[: len(fewer[-1].splitlines()) - 2] == fewer[-1].splitlines()[:-2]


def test_few_shot_opens_with_two_demonstrations_under_the_recipes_own_prompt(
    shown: list[str],
) -> None:
    texts, ready = opening("few_shot", *shown)
    assert texts[0] == ready.recipe.arguments.system_prompt
    assert "Be brief." not in texts
    assert texts.count("Where was Ada born?") == 2
    assert texts[-1] == ready.task.test[0]["question"]
    assert ready.limits == ready.recipe.training.limits
    assert [tool["function"]["name"] for tool in ready.codec.tools] == ["search"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": []}\n', "holds 1 conversations, few_shot shows 2"),
        (
            '{"messages": []}\n{"messages": []}\n',
            r"talks.jsonl, line 1: a demonstration needs a quest",
        ),
        ("no json\n", r"talks.jsonl, line 1: expected one JSON object a line"),
    ],
)
def test_demonstrations_that_cannot_be_shown_are_a_mistake(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        opening("few_shot", "--demonstrations", str(path))
