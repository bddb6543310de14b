"""The systems that `agentr1 eval` compares: what each is, and how it is loaded and played.

Layer 7, above recipes and models, below the verbs. All systems answer the same rows under one
budget: what the policy may retrieve in all its searches, a system without searches of its own gets
at once. Home of `load_player`, which `play` shares.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from agentr1.codec import Codec
from agentr1.context import with_context
from agentr1.data import find_corpus
from agentr1.engines.in_process import InProcessEngine
from agentr1.envs.base import Env, EnvFactory
from agentr1.envs.few_shot import FewShot
from agentr1.envs.one_shot import ClosedBookEnv, NaiveRagEnv
from agentr1.envs.tool_env import ToolEnv
from agentr1.models import ModelSource, eos_ids, load_policy, load_tokenizer, resolve_model
from agentr1.recipe import WITHOUT_TRAINING, Recipe, find_path, load_recipe, search_roots
from agentr1.retrieval.base import Hit
from agentr1.retrieval.remote import is_address
from agentr1.rollout import Limits
from agentr1.sft import read_conversations, recorded
from agentr1.task import Task, build_task
from agentr1.tools.search import Search, result_line, shortened
from agentr1.types import Message

SYSTEMS: dict[str, str] = {
    "policy": "the model named by --model, in the recipe's environment",
    "closed_book": "untrained, the question alone",
    "naive_rag": "untrained, one retrieval for the question, then the answer",
    "base_tool_call": "untrained, in the recipe's environment",
    "few_shot": "untrained, in the recipe's environment after two demonstrations",
    "cold_start": "the model named by --cold-start, in the recipe's environment",
}
"""Name to what it is; "untrained" is the recipe's `base_model`, or the model it trains."""

DEMONSTRATIONS = 2
"""Conversations that `few_shot` is shown."""


class Budget(NamedTuple):
    """What a system may use for one question.

    Attributes:
        turns: model calls.
        tokens: after the prompt, actions and observations together.
        answer_tokens: of one turn, so of an answer.
        passages: retrieved, in all searches together.
        passage_tokens: of all passages together.
        passage_chars: likewise, which `tool_max_chars` leaves to all searches.
    """

    turns: int
    tokens: int
    answer_tokens: int
    passages: int
    passage_tokens: int
    passage_chars: int

    def __str__(self) -> str:
        return (
            f"at most {self.passages} passages of {self.passage_tokens} tokens or "
            f"{self.passage_chars} characters together, "
            f"{self.answer_tokens} tokens an answer; with tools {self.turns} turns and "
            f"{self.tokens} tokens in all"
        )


@dataclasses.dataclass(frozen=True)
class System:
    """One of `SYSTEMS`, with the weights it plays with."""

    name: str
    source: ModelSource


@dataclasses.dataclass(frozen=True)
class Player:
    """A system ready to play a recipe's rows."""

    recipe: Recipe
    task: Task
    codec: Codec
    engine: InProcessEngine
    limits: Limits


@dataclasses.dataclass(frozen=True)
class Weights:
    """A loaded model with its tokenizer; several systems share them."""

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    model: Any


def prepare(
    name: str, overrides: Sequence[str] = (), whole: str | None = None
) -> tuple[Recipe, Task]:
    """Resolve a recipe for playing; no weights are loaded.

    Args:
        name: recipe, see `recipe.find_recipe`.
        overrides: command-line options that overrule the recipe's keys.
        whole: a split whose rows are all read, whatever limit the recipe sets.

    Raises:
        ValueError, FileNotFoundError: a mistake in the recipe or the command.
    """
    disable_progress_bar()
    recipe = load_recipe(name, [*WITHOUT_TRAINING, *overrides])
    recipe.training.use_vllm = False  # a policy that is not trained is loaded here anyway
    recipe.training.check_for_environment()
    lifted: dict[str, None] = {f"{whole}_limit": None} if whole else {}
    return recipe, build_task(dataclasses.replace(recipe.arguments, **lifted))


def load_player(name: str, overrides: Sequence[str] = (), policy: str | None = None) -> Player:
    """Resolve a recipe and load a policy for it.

    Args:
        name: recipe, see `recipe.find_recipe`.
        overrides: command-line options that overrule the recipe's keys.
        policy: see `find_policy`.

    Raises:
        ValueError, FileNotFoundError: a mistake in the recipe or the command.
    """
    recipe, task = prepare(name, overrides)
    return player("policy", recipe, task, load_weights(find_policy(policy, recipe), recipe))


def find_policy(name: str | None, recipe: Recipe) -> ModelSource:
    """Where a policy's weights are.

    Args:
        name: model id, model folder, adapter folder or run folder; None for the recipe's own.
        recipe: it is to play.
    """
    named = name or str(recipe.model.model_name_or_path)
    final = Path(named) / "final"
    return resolve_model(str(final) if final.is_dir() else named, search_roots())


def load_weights(source: ModelSource, recipe: Recipe) -> Weights:
    """Load a model for inference, in the recipe's precision."""
    tokenizer = load_tokenizer(source, search_roots())
    dtype = str(recipe.model.dtype)
    model: Any = load_policy(source, search_roots(), dtype=dtype, attn_implementation="sdpa")
    return Weights(source, tokenizer, model.to(device_of(recipe)).eval())


def device_of(recipe: Recipe) -> str:
    """Where a recipe's policies are played."""
    return "cuda" if torch.cuda.is_available() and not recipe.training.use_cpu else "cpu"


def choose(
    recipe: Recipe,
    task: Task,
    baselines: Sequence[str] = (),
    policy: str | None = None,
    cold_start: str | None = None,
) -> tuple[list[System], list[str]]:
    """Which systems to compare, the policy first; nothing is loaded.

    Args:
        recipe: theirs.
        task: of the recipe.
        baselines: names, or "all" for every one that can be played here.
        policy: see `find_policy`.
        cold_start: the same for the system of that name.

    Returns:
        The systems, and why each that "all" would name is not among them.

    Raises:
        ValueError: no such baseline, or one that is named lacks something.
        FileNotFoundError: no such model.
    """
    known = [name for name in SYSTEMS if name != "policy"]
    if unknown := [name for name in baselines if name not in (*known, "all")]:
        raise ValueError(f"--baselines: unknown {unknown}, expected all, or some of {known}")
    lacking = {name: _lacking(name, recipe, task, cold_start) for name in known}
    for name in baselines:
        if name != "all" and lacking[name]:
            raise ValueError(f"--baselines {name}: {lacking[name]}")
    every = "all" in baselines
    chosen = [n for n in known if n in baselines or (every and not lacking[n])]
    models = {"policy": policy, "cold_start": cold_start}
    untrained = recipe.arguments.base_model
    systems = [
        System(n, find_policy(models.get(n, untrained), recipe)) for n in ("policy", *chosen)
    ]
    return systems, [f"{n} is left out: {why}" for n, why in lacking.items() if every and why]


def _lacking(name: str, recipe: Recipe, task: Task, cold_start: str | None) -> str | None:
    """What a baseline needs and does not have here."""
    if name == "cold_start" and cold_start is None:
        return "it needs the model of a supervised cold start, --cold-start MODEL"
    if name == "few_shot" and recipe.arguments.demonstrations is None:
        return (
            f"it shows the first {DEMONSTRATIONS} conversations of the recipe's `demonstrations`, "
            "and the recipe names none; add --demonstrations FILE"
        )
    if name in ("closed_book", "naive_rag") and "question" not in task.train[0]:
        return f"rows need a `question`, they have {sorted(task.train[0])}"
    if name == "naive_rag" and search_of(task) is None:
        return "it needs agentr1.tools.search.Search among the recipe's tools"
    return None


def search_of(task: Task) -> Search | None:
    """The search tool of a task, if it has one."""
    env = task.env_factory()
    tools = env.runner.tools if isinstance(env, ToolEnv) else ()
    return next((tool for tool in tools if isinstance(tool, Search)), None)


def corpus_of(recipe: Recipe, task: Task) -> Path | str | None:
    """Where the passages are that a task's search tool looks through, if it has one."""
    if search_of(task) is None:
        return None
    named = recipe.arguments.corpus
    if named is not None and not is_address(named):
        named = find_path(named, "corpus")
    return find_corpus(find_path(recipe.arguments.dataset, "dataset folder"), named)


def budget_of(recipe: Recipe) -> Budget:
    """What a recipe allows its policy for one question, for all systems alike.

    Searches are counted one a turn, the last turn is the answer's. Without `max_turn_tokens` an
    answer is left half of the tokens.
    """
    limits, arguments = recipe.training.limits, recipe.arguments
    searches = [limits.max_turns - 1, arguments.max_calls, arguments.tool_max_calls]
    answer = min(
        limits.max_turn_tokens or limits.max_completion_length // 2, limits.max_completion_length
    )
    shown = [limits.max_completion_length - answer, limits.max_observation_tokens]
    allowed = max(1, min(n for n in searches if n is not None))
    return Budget(
        turns=limits.max_turns,
        tokens=limits.max_completion_length,
        answer_tokens=answer,
        passages=arguments.search_top_k * allowed,
        passage_tokens=min(n for n in shown if n is not None),
        passage_chars=arguments.tool_max_chars * allowed,
    )


def player(name: str, recipe: Recipe, task: Task, weights: Weights) -> Player:
    """Make one of `SYSTEMS` ready to play.

    Raises:
        ValueError, FileNotFoundError: demonstrations that cannot be read, or a context that the
            first row does not fit into.
    """
    limits: Limits = recipe.training.limits
    if name in ("closed_book", "naive_rag"):
        answer = budget_of(recipe).answer_tokens
        # One more than an answer takes: a cut one is the environment's to judge and to count.
        limits = dataclasses.replace(
            limits, max_turns=1, max_turn_tokens=answer, max_completion_length=answer + 1
        )
        codec = Codec(weights.tokenizer, (), weights.source.path_or_id)
        task = dataclasses.replace(task, env_factory=_one_shot(name, recipe, task, codec))
    else:
        schemas = task.env_factory().tool_schemas
        codec = Codec(weights.tokenizer, schemas, weights.source.path_or_id)
        if name == "few_shot":
            shown, make = demonstrations(recipe, codec), task.env_factory
            task = dataclasses.replace(task, env_factory=lambda: FewShot(make(), shown))
        task = with_context(task, recipe, codec)
    stop_ids = sorted(codec.stop_ids | eos_ids(weights.model))
    engine = InProcessEngine(weights.model, stop_ids, recipe.training.max_slots)
    return Player(recipe, task, codec, engine, limits)


def _one_shot(name: str, recipe: Recipe, task: Task, codec: Codec) -> EnvFactory:
    """Environments of one turn: the question, and for Naive RAG all passages at once."""
    if name == "closed_book":
        return ClosedBookEnv
    search, budget = search_of(task), budget_of(recipe)
    assert search is not None  # `choose` has seen it

    def tokens(text: str) -> int:
        return len(codec.action(text)) - len(codec.end_of_turn_ids)

    retriever = WithinBudget(search, budget, tokens)

    def make() -> Env:
        return NaiveRagEnv(retriever, budget.passages)

    return make


class WithinBudget:
    """What a search tool's retriever finds, from the best on, as long as it fits.

    Args:
        search: the tool; passages are cut as it cuts them.
        budget: its tokens and characters of all passages together.
        count: tokens of a text.
    """

    def __init__(self, search: Search, budget: Budget, count: Callable[[str], int]) -> None:
        self._search = search
        self._budget = budget
        self._count = count

    async def find(self, query: str, k: int) -> list[Hit]:
        """At most `k` hits; the first that does not fit is cut to the room left and ends them."""
        tokens, chars = self._budget.passage_tokens, self._budget.passage_chars
        found: list[Hit] = []
        for hit in await self._search.retriever.find(query, k):
            whole = _cut(hit, self._search.passage_chars)
            fitting = whole if self._fits(whole, tokens, chars) else self._part(hit, tokens, chars)
            if fitting is not None:
                found.append(fitting)
            if fitting is not whole:
                break
            line = _line(whole)
            tokens, chars = tokens - self._count(line), chars - len(line)
        return found

    def _fits(self, hit: Hit, tokens: int, chars: int) -> bool:
        line = _line(hit)
        return len(line) <= chars and self._count(line) <= tokens

    def _part(self, hit: Hit, tokens: int, chars: int) -> Hit | None:
        """A hit with the longest beginning of its text that fits; None if not a character does."""
        low, high = 0, min(len(hit.passage.text), self._search.passage_chars or chars, chars)
        while low < high:  # `low` fits, or is nothing
            middle = (low + high + 1) // 2
            if self._fits(_cut(hit, middle), tokens, chars):
                low = middle
            else:
                high = middle - 1
        return _cut(hit, low) if low else None


def _cut(hit: Hit, limit: int | None) -> Hit:
    text = shortened(hit.passage.text, limit)
    return hit._replace(passage=dataclasses.replace(hit.passage, text=text))


def _line(hit: Hit) -> str:
    return f"{result_line(hit.passage)}\n"


def demonstrations(recipe: Recipe, codec: Codec) -> list[Message]:
    """The first conversations of a recipe's demonstrations, without their system prompts.

    Raises:
        ValueError, FileNotFoundError: there are none, or one is no conversation.
    """
    path = find_path(str(recipe.arguments.demonstrations), "demonstrations")
    shown = list(itertools.islice(read_conversations(path), DEMONSTRATIONS))
    if len(shown) < DEMONSTRATIONS:
        raise ValueError(
            f"{path} holds {len(shown)} conversations, few_shot shows {DEMONSTRATIONS}; add some"
        )
    found: list[Message] = []
    for place, conversation in shown:
        try:
            found += recorded(conversation, codec).messages
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return [message for message in found if message.role != "system"]
