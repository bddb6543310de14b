"""YAML and overrides to objects: the one place where names become things.

`load_recipe` reads a flat YAML into dataclasses; `build_task` resolves its dotted paths into rows,
environment, rewards and metrics, and tries the environment on a row. Neither loads model weights,
so every mistake of a recipe shows within seconds.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from trl import ModelConfig, TrlParser

from agentr1.config import AgentConfig
from agentr1.credit_config import LOSSES_OF_CONTEXTS
from agentr1.data import find_corpus, find_split, load_rows
from agentr1.envs.base import EnvFactory
from agentr1.envs.check import check_env
from agentr1.envs.tool_env import ToolEnv
from agentr1.loops import finish
from agentr1.recipe_arguments import TAPE_WAYS, RecipeArguments
from agentr1.retrieval.remote import is_address
from agentr1.scoring import Metric
from agentr1.tools.base import Tool
from agentr1.tools.policy import ToolPolicy
from agentr1.tools.runner import ToolRunner
from agentr1.tools.tape import RecordingRunner, ReplayingRunner

_PACKAGE = Path(__file__).resolve().parent
WITHOUT_TRAINING = ("--bf16", "false")
"""Overrides for what only plays: mixed precision is refused where there is no GPU."""
_GIVEN_TO_REWARDS = (
    *("prompts", "completions", "completion_ids", "trajectories"),
    *("trainer_state", "log_extra", "log_metric"),
)
"""What TRL and the rollout hand to an outcome reward by name, beside the row's columns."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe with its overrides applied.

    Attributes:
        name: task and algorithm, `quickstart/grpo`.
        text: the YAML as read, for the run folder.
        arguments: data, environment, tools, rewards.
        training: the config class the caller asked for, `AgentConfig` or TRL's `SFTConfig`.
        model: TRL's `ModelConfig`.
    """

    name: str
    text: str
    arguments: RecipeArguments
    training: Any
    model: ModelConfig


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


def search_roots() -> list[Path]:
    """Where recipes and data are looked for: working directory, checkout, installed package."""
    return [Path.cwd(), _PACKAGE.parent.parent, _PACKAGE / "_packaged"]


def find_path(name: str, what: str) -> Path:
    """Find a file or folder under the search roots.

    Raises:
        FileNotFoundError: listing the places looked at.
    """
    places = list(dict.fromkeys(root / name for root in search_roots()))
    for place in places:
        if place.exists():
            return place
    tried = ", ".join(str(place) for place in places)
    raise FileNotFoundError(f"{what} {name!r} was not found; looked at {tried}")


def find_recipe(name: str) -> Path:
    """`x` is `recipes/x/grpo.yaml`, `x/y` is `recipes/x/y.yaml`; a path is taken as it is.

    Raises:
        FileNotFoundError: no such recipe; the message lists those there are.
    """
    if name.endswith((".yaml", ".yml")):
        return find_path(name, "recipe")
    relative = Path("recipes") / (f"{name}.yaml" if "/" in name else f"{name}/grpo.yaml")
    for root in search_roots():
        if (root / relative).is_file():
            return root / relative
    known = sorted(
        {
            f"{path.parent.name}/{path.stem}"
            for root in search_roots()
            for path in (root / "recipes").glob("*/*.yaml")
            if path.parent.name != "accelerate"
        }
    )
    raise FileNotFoundError(f"no recipe {name!r} (looked for {relative}); known recipes: {known}")


class _Parser(TrlParser):
    """TrlParser whose complaints are exceptions, without pages of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def load_recipe(name: str, overrides: Sequence[str] = (), training: type = AgentConfig) -> Recipe:
    """Read a recipe and apply the command line's overrides.

    Args:
        name: see `find_recipe`.
        overrides: `["--max_steps", "5"]`. `--tools record:FILE` and `--tools replay:FILE` keep
            the recipe's tools and set `tool_tape`.
        training: dataclass of the trainer's own settings.

    Raises:
        ValueError: unknown key, wrong type, impossible combination.
        FileNotFoundError: no such recipe.
    """
    path = find_recipe(name)
    text = path.read_text(encoding="utf-8")
    try:
        keys = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(keys, dict):
        raise ValueError(
            f"{path} must hold keys and values, got {keys!r}; write `key: value` lines"
        )
    nested = [key for key, value in keys.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{path}: recipes are flat, but {nested} hold mappings; write plain keys")
    kinds: Any = (RecipeArguments, training, ModelConfig)
    parser = _Parser(kinds, allow_abbrev=False)
    try:
        arguments, config, model, unknown = parser.parse_args_and_config(
            ["--config", str(path), *_with_tape(overrides)], return_remaining_strings=True
        )
        if unknown:
            raise ValueError(_unknown_keys(unknown, kinds))
        if isinstance(config, AgentConfig):
            config.keep_given(keys | _options(overrides))
            _check_together(arguments, config, model)
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from error
    return Recipe(f"{path.parent.name}/{path.stem}", text, arguments, config, model)


def _options(overrides: Sequence[str]) -> dict[str, str]:
    """`--key value` and `--key=value` as names and texts."""
    given = {}
    for word, following in itertools.zip_longest(overrides, overrides[1:], fillvalue=""):
        name, joined, value = word.partition("=")
        if name.startswith("--"):
            given[name[2:].replace("-", "_")] = value if joined else following
    return given


def _with_tape(overrides: Sequence[str]) -> list[str]:
    """`--tools record:FILE` as `--tool_tape record:FILE`: other values would replace the tools."""
    words = list(overrides)
    for i, word in enumerate(words):
        option, joined, value = word.partition("=")
        value = value if joined else "".join(words[i + 1 : i + 2])
        if option == "--tools" and value.partition(":")[0] in TAPE_WAYS:
            words[i] = f"--tool_tape{joined}{value if joined else ''}"
    return words


def _unknown_keys(unknown: Sequence[str], kinds: Sequence[type]) -> str:
    """Say which keys nobody knows, and what they may have been meant to be."""
    known = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    names = [word.removeprefix("--").partition("=")[0] for word in unknown if word.startswith("--")]
    close = {n: difflib.get_close_matches(n.replace("-", "_"), known, n=1) for n in names}
    guesses = [
        f"{name!r} (did you mean {found[0]}?)" if found else repr(name)
        for name, found in close.items()
    ]
    return (
        f"unknown {', '.join(guesses) or unknown}; a key is a field of RecipeArguments, "
        f"{kinds[1].__name__} or TRL's ModelConfig"
    )


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


def metric_name(path: str) -> str:
    """What a metric's dotted path is called in results: `a.b.exact_match_reward`, exact_match."""
    return path.rpartition(".")[2].removesuffix("_reward")


def _check_together(arguments: RecipeArguments, config: AgentConfig, model: ModelConfig) -> None:
    """What only the parts of a recipe tell together, and TRL only after loading weights."""
    streams = config.vllm_mode == "server" and torch.cuda.is_available()
    if config.use_vllm and not model.use_peft and not streams:
        raise ValueError(
            f"use_vllm with vllm_mode={config.vllm_mode!r} takes weights as an adapter here, but "
            "use_peft is false; set use_peft: true, or sample in process (use_vllm: false). Whole "
            "weights need vllm_mode: server and a GPU"
        )
    weights = config.reward_weights
    if weights is not None and len(weights) != len(arguments.rewards):
        raise ValueError(
            f"reward_weights needs one weight per reward, got {weights} for {arguments.rewards}"
        )
    if arguments.process_rewards:
        config.check_for_turn_advantages()
    shorten = ("keep_last_observations", "context_tokens")
    shortened = [key for key in shorten if getattr(arguments, key) is not None]  # 0 shortens most
    if shortened and config.loss_type not in LOSSES_OF_CONTEXTS:
        raise ValueError(
            f"{shortened[0]} makes several rows of an episode, but loss_type={config.loss_type!r} "
            f"takes each row for an episode; use one of {list(LOSSES_OF_CONTEXTS)}"
        )
    known = [f"eval_{metric_name(path)}" for path in arguments.metrics]
    best = config.metric_for_best_model
    if best is not None and f"eval_{best.removeprefix('eval_')}" not in known:
        raise ValueError(
            f"metric_for_best_model must be one of {known}, got {best!r} ('loss' is what is looked "
            "for where load_best_model_at_end is set and this is not)"
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
