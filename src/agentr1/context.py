"""A recipe's keys for what the policy is shown, on top of its environment.

Layer 6, between `task.build_task` and whoever plays: apart from the task itself, since these keys
count tokens and a task is built before any tokenizer is there. How a context is kept short is
`envs.context`, what the policy is told is `envs.budget`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from agentr1.codec import Codec
from agentr1.envs.base import Env
from agentr1.envs.budget import BudgetEnv
from agentr1.envs.check import check_env
from agentr1.envs.context import ContextEnv, Count
from agentr1.loops import finish
from agentr1.recipe import Recipe
from agentr1.task import Task
from agentr1.types import Message


def with_context(task: Task, recipe: Recipe, codec: Codec) -> Task:
    """Wrap the task's environments as `keep_last_observations` and the like ask for.

    Args:
        task: of the recipe.
        recipe: its keys and the limits of its rollouts.
        codec: of the policy's tokenizer, with the environment's tools.

    Raises:
        ValueError: a value that is out of range, or that the first row does not fit into.
    """
    arguments, limits = recipe.arguments, recipe.training.limits
    shorten = (arguments.keep_last_observations, arguments.context_tokens)
    if shorten == (None, None) and not arguments.tell_budget:
        return task
    count = counter(codec)

    def make() -> Env:
        env = task.env_factory()
        if shorten != (None, None):
            env = ContextEnv(env, *shorten, count)
        if arguments.tell_budget:  # outermost, since it must see what is rewritten
            env = BudgetEnv(env, limits.max_turns, limits.max_completion_length, count)
        return env

    finish(check_env(make, task.train[0]))
    return dataclasses.replace(task, env_factory=make)


def counter(codec: Codec) -> Count:
    """Count a conversation in a policy's tokens.

    Each message is encoded once, however long the conversation grows. Results of one turn that a
    template joins count a few tokens more than they take.
    """
    between = len(codec.observation((), ()))  # from the end of a turn to the beginning of the next

    @functools.lru_cache(maxsize=8192)
    def opening(messages: tuple[Message, ...]) -> int:
        return len(codec.prompt(messages))

    @functools.lru_cache(maxsize=8192)
    def said(content: str) -> int:
        return len(codec.action(content)) - len(codec.end_of_turn_ids)

    @functools.lru_cache(maxsize=8192)
    def shown(message: Message) -> int:
        return len(codec.observation((message,), ())) - between

    def appended(message: Message) -> int:
        if message.role != "assistant":
            return shown(message)
        sampled = message.length  # the policy's words stand as they were sampled
        return (said(message.content) if sampled is None else sampled) + between

    def count(messages: Sequence[Message]) -> int:
        roles = [message.role for message in messages]
        first = roles.index("assistant") if "assistant" in roles else len(messages)
        return opening(tuple(messages[:first])) + sum(map(appended, messages[first:]))

    return count
