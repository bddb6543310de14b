"""A recipe's names to objects: rows, environment, tools, rewards and metrics.

Layer 6. `build_task` resolves the dotted paths and tries the environment on a row. It loads no
weights and must not know trainers, so every mistake shows within seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentr1.data import find_corpus, find_split, load_rows
from agentr1.envs.base import EnvFactory
from agentr1.envs.check import check_env
from agentr1.envs.tool_env import ToolEnv
from agentr1.loops import finish
from agentr1.recipe import find_path, metric_name
from agentr1.recipe_arguments import RecipeArguments
from agentr1.retrieval.remote import is_address
from agentr1.scoring import Metric
from agentr1.tools.base import Tool
from agentr1.tools.policy import ToolPolicy
from agentr1.tools.runner import ToolRunner
from agentr1.tools.tape import RecordingRunner, ReplayingRunner

_GIVEN_TO_REWARDS = (
    *("prompts", "completions", "completion_ids", "trajectories"),
    *("trainer_state", "log_extra", "log_metric"),
)
"""What TRL and the rollout hand to an outcome reward by name, beside the row's columns."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a recipe's names stand for.

    Attributes:
        train, dev, test: rows.
        tested: the split that `test` was read from: dev where the data set has no other.
        env_factory: makes one environment per episode; the tools are shared.
        rewards: outcome rewards, in the recipe's order.
        metrics: name to metric.
    """

    train: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    test: list[dict[str, Any]]
    tested: str
    env_factory: EnvFactory
    rewards: list[Metric]
    metrics: dict[str, Metric]


def build_task(arguments: RecipeArguments) -> Task:
    """Resolve what the arguments name, and try the environment on the first row.

    Raises:
        ValueError, FileNotFoundError: with the value, the expectation and the way out.
    """
    folder = find_path(arguments.dataset, "dataset folder")
    limits = {split: getattr(arguments, f"{split}_limit") for split in ("train", "dev", "test")}
    env_factory = _env_factory(arguments, folder)
    questions = isinstance(env_factory, functools.partial)  # the one that `ToolEnv` is made with
    files = {split: find_split(folder, split, dev_for_test=True) for split in limits}
    rows = {
        split: load_rows(files[split], limit, questions=questions)
        for split, limit in limits.items()
    }
    finish(check_env(env_factory, rows["train"][0]))
    columns = [name for name in rows["train"][0] if name not in ("prompt", *_GIVEN_TO_REWARDS)]
    given = dict.fromkeys([*_GIVEN_TO_REWARDS, *columns])
    return Task(
        **rows,
        tested="dev" if files["test"] == files["dev"] else "test",
        env_factory=env_factory,
        rewards=[_callable(path, "rewards", **given) for path in arguments.rewards],
        metrics={
            metric_name(path): _callable(path, "metrics", trajectories=[])
            for path in arguments.metrics
        },
    )


def resolve(path: str, field: str) -> Any:
    """Import the object a dotted path names; attributes of classes count too.

    Raises:
        ValueError: naming the recipe's field, the path and the part that is missing.
    """
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:split])
        try:
            found: Any = importlib.import_module(module_name)
        except (ImportError, SyntaxError) as error:
            absent = error.name if isinstance(error, ModuleNotFoundError) else None
            if absent is None or not f"{module_name}.".startswith(f"{absent}."):
                raise ValueError(f"{field}: importing {module_name!r} failed: {error}") from error
            continue
        for attribute in parts[split:]:
            if not hasattr(found, attribute):
                raise ValueError(
                    f"{field}: {path!r} does not resolve, {module_name!r} has no {attribute!r}; "
                    "write a dotted path such as agentr1.rewards.exact_match_reward"
                )
            found = getattr(found, attribute)
        return found
    raise ValueError(
        f"{field}: {path!r} does not resolve, there is no module {parts[0]!r}; write a dotted path "
        "such as agentr1.rewards.exact_match_reward and start where it can be imported"
    )


def _env_factory(arguments: RecipeArguments, folder: Path) -> EnvFactory:
    environment: Callable[..., Any] = resolve(arguments.environment, "environment")
    if not (inspect.isclass(environment) and issubclass(environment, ToolEnv)):
        made = _callable(arguments.environment, "environment")
        ours = (
            *("tools", "tool_tape", "max_calls", "finish_tool"),
            *("process_rewards", "system_prompt"),
        )
        if ignored := [name for name in ours if getattr(arguments, name)]:
            raise ValueError(
                f"environment {arguments.environment!r} is no ToolEnv and would ignore {ignored}; "
                "remove them, or derive the environment from agentr1.ToolEnv"
            )
        return made
    weights = arguments.process_reward_weights or [1.0] * len(arguments.process_rewards)
    functions = [
        _callable(path, "process_rewards", "row", "outcomes", "past")
        for path in arguments.process_rewards
    ]
    return functools.partial(
        environment,
        _tool_runner(arguments, folder),
        system_prompt=arguments.system_prompt,
        process_rewards=tuple(zip(functions, weights, strict=True)),
        finish_tool=arguments.finish_tool,
        max_calls=arguments.max_calls,
    )


def _tool_runner(arguments: RecipeArguments, folder: Path) -> ToolRunner:
    policy = ToolPolicy(
        timeout=arguments.tool_timeout,
        retries=arguments.tool_retries,
        backoff=arguments.tool_backoff,
        deadline=arguments.tool_deadline,
        concurrency=arguments.tool_concurrency,
        cache=arguments.tool_cache,
        max_calls=arguments.tool_max_calls,
        max_chars=arguments.tool_max_chars,
    )
    way, _, file = (arguments.tool_tape or "").partition(":")
    if way == "replay":  # makes no tool, so needs none of what they are made from
        path = find_path(file, "recording of tools")
        return ReplayingRunner(path, None, policy, arguments.tool_replay_latency)
    tools = [_tool(path, arguments, folder) for path in arguments.tools]
    if way == "record":
        return RecordingRunner(file, tools, default_policy=policy)
    return ToolRunner(tools, default_policy=policy)


def _tool(path: str, arguments: RecipeArguments, folder: Path) -> Tool:
    found = resolve(path, "tools")
    if not inspect.isclass(found) and hasattr(found, "parameters"):
        return found
    make: Any = found
    chars = arguments.search_passage_chars
    given = {} if chars is None else {"passage_chars": chars}
    try:
        made = make(find_corpus(folder, _corpus(arguments)), arguments.search_top_k, **given)
    except TypeError as error:
        raise ValueError(
            f"tools: {path!r} is neither a tool nor makes one from a corpus, search_top_k"
            f"{' and search_passage_chars' if given else ''}: {error}; decorate the function with "
            "@tool, or name one like Search.from_corpus"
        ) from error
    if not isinstance(made, Tool):
        raise ValueError(f"tools: {path!r} made {made!r}, expected a tool, see agentr1.Tool")
    return made


def _callable(path: str, field: str, *positional: Any, **named: Any) -> Any:
    """Resolve what will be called, and see that it can be called like that."""
    found = resolve(path, field)
    try:
        inspect.signature(found).bind(*positional, **named)
        if inspect.isabstract(found):
            raise TypeError(f"it is abstract, without {sorted(found.__abstractmethods__)}")
    except TypeError as error:
        raise ValueError(
            f"{field}: {path!r} cannot be called with {[*positional, *named]}: {error}; see "
            f"agentr1.{'envs' if field == 'environment' else 'rewards'} for what can"
        ) from error
    return found


def _corpus(arguments: RecipeArguments) -> Path | str | None:
    if not arguments.corpus or is_address(arguments.corpus):
        return arguments.corpus
    return find_path(arguments.corpus, "corpus")
