"""Recipes: finding a flat YAML, reading it and the command's overrides into dataclasses.

Layer 6. What its dotted paths name is resolved by `task.build_task`. Must not know weights: every
mistake shows within seconds.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from trl import ModelConfig, TrlParser

from agentr1.config import AgentConfig
from agentr1.credit_config import LOSSES_OF_CONTEXTS
from agentr1.recipe_arguments import TAPE_WAYS, RecipeArguments

_PACKAGE = Path(__file__).resolve().parent
WITHOUT_TRAINING = ("--bf16", "false")
"""Overrides for what only plays: mixed precision is refused where there is no GPU."""


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
