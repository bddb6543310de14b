"""A recipe's keys for the context reach the policy: what it is shown fits, in its own tokens."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentr1.codec import Codec
from agentr1.context import counter, with_context
from agentr1.engines.base import Generation, Sampling
from agentr1.envs.base import Env
from agentr1.envs.budget import BudgetEnv
from agentr1.envs.context import DROPPED, ContextEnv
from agentr1.envs.tool_env import ToolEnv
from agentr1.models import load_tokenizer, resolve_model
from agentr1.parsing import render_call
from agentr1.recipe import Recipe, load_recipe, search_roots
from agentr1.rollout import rollout_batch
from agentr1.segments import flatten
from agentr1.systems import load_player
from agentr1.task import Task, build_task
from agentr1.train import train
from agentr1.types import Message, Row, StepResult, Trajectory
from fakes import ScriptedPolicy

ROOT = Path(__file__).resolve().parents[1]
HERE = ["--use_cpu", "true", "--train_limit", "4", "--dev_limit", "4", "--test_limit", "4"]


def prepared(*overrides: str) -> tuple[Task, Recipe, Codec]:
    """The quickstart's task without the keys in question, and its codec."""
    recipe = load_recipe("quickstart", [*HERE, *overrides])
    task = build_task(recipe.arguments)
    source = resolve_model(recipe.model.model_name_or_path, search_roots())
    tokenizer = load_tokenizer(source)
    return task, recipe, Codec(tokenizer, task.env_factory().tool_schemas, source.path_or_id)


class Watched(ScriptedPolicy):
    """Keeps every context it was given."""

    def __init__(self, codec: Codec, script: Sequence[str]) -> None:
        super().__init__(codec, {"": script})
        self.contexts: list[tuple[int, ...]] = []

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        self.contexts.append(tuple(prompt_ids))
        return await super().generate(prompt_ids, sampling)


class Repeats(Env):
    """Rewrites every context to what it is anyway."""

    def __init__(self, env: Env) -> None:
        self.env = env

    async def reset(self, row: Row) -> Sequence[Message]:
        self.shown = tuple(await self.env.reset(row))
        return self.shown

    async def step(self, message: Message) -> StepResult:
        result = await self.env.step(message)
        self.shown += (message, *result.observation)
        return result if result.terminated else dataclasses.replace(result, rewrite=self.shown)


def play(
    *overrides: str, wrap: Callable[[Env], Env] = lambda env: env
) -> tuple[Trajectory, list[tuple[int, ...]], Codec]:
    """The first row, searched for three times."""
    unmanaged, recipe, codec = prepared(*overrides)
    task = with_context(unmanaged, recipe, codec)
    searches = [render_call("search", {"query": f"{word} of the town"}) for word in ("a", "b", "c")]
    policy = Watched(codec, [*searches, "42"])
    work = rollout_batch(
        task.train[:1],
        lambda: wrap(task.env_factory()),
        codec,
        policy,
        limits=recipe.training.limits,
        samplings=[Sampling(1)],
    )
    return asyncio.run(work)[0], policy.contexts, codec


def test_a_recipe_without_the_keys_keeps_its_task() -> None:
    task, recipe, codec = prepared()
    assert with_context(task, recipe, codec) is task


def test_the_keys_become_wrappers_and_the_budget_is_the_outermost() -> None:
    keys = ["--keep_last_observations", "2", "--context_tokens", "300", "--tell_budget", "true"]
    task, recipe, codec = prepared(*keys)
    env: Any = with_context(task, recipe, codec).env_factory()
    assert isinstance(env, BudgetEnv)
    assert env.max_completion_length == recipe.training.max_completion_length
    assert isinstance(env.env, ContextEnv)
    assert (env.env.keep_last_observations, env.env.context_tokens) == (2, 300)
    assert isinstance(env.env.env, ToolEnv)
    assert env.tool_schemas == task.env_factory().tool_schemas
    alone, recipe, codec = prepared("--tell_budget", "true")
    assert isinstance(with_context(alone, recipe, codec).env_factory().env, ToolEnv)


def test_zero_observations_are_not_all_of_them() -> None:
    episode, contexts, codec = play("--keep_last_observations", "0")
    assert [turn.prompt_ids is None for turn in episode.turns] == [False, True, True, True]
    assert codec.tokenizer.decode(contexts[-1]).count(DROPPED) == 3


@pytest.mark.parametrize("limit", [180, 200, 1000])
def test_no_context_is_longer_than_its_limit(limit: int) -> None:
    _, appended, _ = play()
    assert len(appended) == 4
    episode, contexts, _ = play("--context_tokens", str(limit))
    assert episode.stop_reason.is_terminal
    assert max(map(len, contexts)) <= limit
    if limit == 1000:
        assert contexts == appended


class LetterByLetter(Watched):
    """Says the same in as many tokens as it can, as no tokenizer would encode it."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        whole = await super().generate(prompt_ids, sampling)
        text = self.codec.tokenizer.decode(whole.ids[:-1])
        letters = [i for letter in text for i in self.codec.action(letter)[:-1]]
        ids = (*letters, whole.ids[-1])
        return Generation(ids, (0.0,) * len(ids), whole.finish_reason)


def test_a_limit_holds_however_the_policy_spells_its_words() -> None:
    unmanaged, recipe, codec = prepared("--context_tokens", "230")
    task = with_context(unmanaged, recipe, codec)
    searches = [render_call("search", {"query": f"{word} of it"}) for word in ("a", "b", "c")]
    policy = LetterByLetter(codec, [*searches, "42"])
    work = rollout_batch(
        task.train[:1],
        task.env_factory,
        codec,
        policy,
        limits=recipe.training.limits,
        samplings=[Sampling(1)],
    )
    asyncio.run(work)
    assert len(policy.contexts) > 1
    assert max(map(len, policy.contexts)) <= 230


def test_a_rewritten_prompt_is_the_context_that_appending_would_have_made() -> None:
    appended, contexts, _ = play()
    rewritten, others, _ = play(wrap=Repeats)
    assert rewritten.messages == appended.messages
    assert [turn.prompt_ids for turn in rewritten.turns] == others
    assert others == contexts
    actions = [i for turn in appended.turns for i in turn.action_ids]
    segments = flatten(rewritten)
    assert len(segments) == 4
    assert [i for s in segments for i in s.completion_ids] == actions
    assert all(all(s.loss_mask) for s in segments)


def test_a_conversation_is_counted_in_the_policys_tokens() -> None:
    for wrap in (Repeats, lambda env: env):
        episode, contexts, codec = play(wrap=wrap)
        count, messages = counter(codec), list(episode.prompt)
        for turn, context in zip(episode.turns, contexts, strict=True):
            assert count(messages) == len(context)
            messages += [turn.message, *turn.observation]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("context_tokens", "0", "context_tokens must be 1 or more"),
        ("context_tokens", "10", "context_tokens is 10, but row '.*' opens with more"),
        ("keep_last_observations", "-1", "keep_last_observations must be 0 or more"),
    ],
)
def test_a_limit_that_cannot_hold_is_refused_before_anything_is_played(
    key: str, value: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        with_context(*prepared(f"--{key}", value))


def test_training_and_evaluation_play_in_the_recipes_context() -> None:
    player = load_player("quickstart/keep_last", HERE)
    assert isinstance(player.task.env_factory(), ContextEnv)
    with pytest.raises(ValueError, match="context_tokens is 10, but row"):
        rows = ("--train_limit", "12")  # a batch of rollouts
        train("quickstart/context_tokens", [*HERE, *rows, "--context_tokens", "10"], dry_run=True)


def test_the_page_about_it_names_every_key() -> None:
    text = (ROOT / "docs" / "context.md").read_text(encoding="utf-8")
    for key in ("keep_last_observations", "context_tokens", "tell_budget"):
        assert f"`{key}: " in text
    assert DROPPED in text
    for name in ("keep_last.yaml", "context_tokens.yaml"):
        assert name in text
        assert (ROOT / "recipes" / "quickstart" / name).is_file()
