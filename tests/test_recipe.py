"""recipe: names become objects, or an error that says what was expected instead."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import SFTConfig

from agentr1 import cli, rewards
from agentr1.codec import Codec
from agentr1.envs.tool_env import ToolEnv
from agentr1.parsing import render_call
from agentr1.recipe import find_path, find_recipe, load_recipe, metric_name, search_roots
from agentr1.recipe_arguments import RecipeArguments
from agentr1.rollout import Limits
from agentr1.scoring import Scored, evaluate_rows
from agentr1.task import build_task, resolve
from agentr1.tools.calculator import calculator
from agentr1.tools.policy import ToolPolicy
from agentr1.tools.search import Search
from fakes import ScriptedPolicy

RECIPE = """\
use_cpu: true
bf16: false
num_generations: 2
per_device_train_batch_size: 4
tools: [agentr1.tools.calculator.calculator]
"""
MODULE = '''
from agentr1 import Env, Message, StepResult, tool

class MyEnv(Env):
    async def reset(self, row):
        return [Message("user", row["question"])]
    async def step(self, message):
        return StepResult(terminated=True, reward=1.0)

class Greedy(MyEnv):
    async def step(self, message):
        return StepResult()

class Needs(MyEnv):
    def __init__(self, what):
        self.what = what

def make():
    return MyEnv()

@tool
def echo(text: str) -> str:
    """Say it again.

    Args:
        text: what.
    """
    return text

def strict(prompts, completions):
    return [0.0] * len(prompts)

def pays(row, turn, earlier):
    return 0.25

def maker(corpus, k):
    return "no tool"

nothing = 3
'''


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Write a recipe into an empty working directory that also holds a user's module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_task.py").write_text(MODULE)

    def write(text: str = "") -> str:
        (tmp_path / "r.yaml").write_text(RECIPE + text)
        return "r.yaml"

    yield write
    sys.modules.pop("my_task", None)


# Finding ---------------------------------------------------------------------------------------


def test_a_bare_name_is_the_tasks_grpo_recipe() -> None:
    assert find_recipe("quickstart").parts[-3:] == ("recipes", "quickstart", "grpo.yaml")
    assert find_recipe("quickstart/rloo").parts[-3:] == ("recipes", "quickstart", "rloo.yaml")


def test_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert search_roots()[0] == tmp_path
    own = tmp_path / "recipes" / "quickstart" / "grpo.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(RECIPE)
    assert find_recipe("quickstart") == own
    assert find_path("recipes", "recipes") == tmp_path / "recipes"
    assert find_path(str(own), "recipe") == own


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe 'x/y'.*'quickstart/grpo'"):
        find_recipe("x/y")


def test_a_missing_path_lists_the_places_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="dataset folder 'nowhere' was not found") as said:
        find_path("nowhere", "dataset folder")
    assert all(str(root / "nowhere") in str(said.value) for root in search_roots())


# Loading ---------------------------------------------------------------------------------------


def test_yaml_and_overrides_become_dataclasses(write: Callable[..., str]) -> None:
    recipe = load_recipe(
        write("learning_rate: 1e-5\nmax_turns: 3\nlora_r: 4\n"),
        ["--max_turns", "7", "--rewards", "a.b", "c.d"],
    )
    assert recipe.training.learning_rate == 1e-5
    assert recipe.training.max_turns == 7  # the command line wins
    assert recipe.arguments.rewards == ["a.b", "c.d"]
    assert recipe.arguments.tools == ["agentr1.tools.calculator.calculator"]
    assert recipe.model.lora_r == 4
    assert recipe.text.endswith("lora_r: 4\n")  # as written, for the run folder
    assert recipe.name.endswith("/r")


def test_another_trainers_config_can_be_asked_for(
    write: Callable[..., str], tmp_path: Path
) -> None:
    write()
    (tmp_path / "sft.yaml").write_text("use_cpu: true\nbf16: false\nmax_length: 9\n")
    assert load_recipe("sft.yaml", training=SFTConfig).training.max_length == 9
    with pytest.raises(ValueError, match="num_generations"):
        load_recipe("r.yaml", training=SFTConfig)


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("no_such: 1\n", [], "no_such"),
        ("", ["--no_such", "1"], "no_such"),
        ("", ["--max_steps"], "expected one argument"),
        ("max_steps: many\n", [], "invalid int value: 'many'"),
        ("env: {A: b}\n", [], r"recipes are flat, but \['env'\]"),
        ("a: [\n", [], "not valid YAML"),
        ("num_generations: 3\n", [], "divisible by num_generations"),
        ("reward_weights: [1.0, 2.0]\n", [], "one weight per reward"),
        ("use_vllm: true\n", [], "use_peft is false; set use_peft: true"),
        (
            "process_rewards: [agentr1.rewards.valid_call]\nloss_type: vespo\n",
            [],
            "one per sequence",
        ),
        (
            "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 500\n",
            [],
            r"metric_for_best_model must be one of \['eval_exact_match'\], got 'loss'",
        ),
    ],
)
def test_a_bad_recipe_is_refused_by_name(
    write: Callable[..., str], text: str, overrides: list[str], said: str
) -> None:
    name = write(text)
    with pytest.raises(ValueError, match=said) as refused:
        load_recipe(name, overrides)
    assert "r.yaml" in str(refused.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "just words\n"])
def test_a_recipe_must_hold_keys_and_values(
    write: Callable[..., str], tmp_path: Path, text: str
) -> None:
    name = write()
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="keys and values"):
        load_recipe(name)


# Resolving -------------------------------------------------------------------------------------


def test_a_dotted_path_names_modules_attributes_and_methods() -> None:
    assert resolve("agentr1.rewards.f1_reward", "rewards") is rewards.f1_reward
    assert resolve("agentr1.tools.calculator.calculator", "tools") is calculator
    assert resolve("agentr1.tools.search.Search.from_corpus", "tools") == Search.from_corpus


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("agentr1.rewards.nope", "'agentr1.rewards' has no 'nope'"),
        ("agentr1.nope.f1", "'agentr1' has no 'nope'"),
        ("no_such_module.f1", "there is no module 'no_such_module'"),
        ("plain", "there is no module 'plain'"),
        ("", "there is no module ''"),
        ("agentr1.tools.search.Search.nope", "has no 'nope'"),
    ],
)
def test_a_path_that_does_not_resolve_names_the_field_and_the_missing_part(
    path: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        resolve(path, "rewards")
    assert str(refused.value).startswith(f"rewards: {path!r} does not resolve")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_package\n", "No module named 'no_such_package'"),
        ("def broken(:\n", "invalid syntax"),
        ("from agentr1 import nope\n", "cannot import name 'nope'"),
    ],
)
def test_a_module_that_fails_to_import_says_why(
    write: Callable[..., str], tmp_path: Path, source: str, said: str
) -> None:
    write()
    (tmp_path / "my_broken.py").write_text(source)
    with pytest.raises(ValueError, match=f"importing 'my_broken' failed: {said}"):
        resolve("my_broken.thing", "tools")


# Building --------------------------------------------------------------------------------------


def without_tools(name: str) -> str:
    path = Path(name)
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("tools:", "system_prompt:"))]
    path.write_text("".join(kept))
    return name


def test_what_a_recipe_says_in_so_many_words_is_kept(write: Callable[..., str]) -> None:
    """A value that equals TRL's default is one, and no algorithm's proposal takes its place."""
    proposed = load_recipe(write("algorithm: gspo\nmax_completion_length: 64"))
    assert proposed.training.epsilon == 3e-4
    kept = load_recipe(write("algorithm: gspo\nepsilon: 2.0e-1\nmax_completion_length: 64"))
    assert kept.training.epsilon == 0.2
    typed = load_recipe(write("algorithm: gspo\nmax_completion_length: 64"), ["--epsilon=.2"])
    assert typed.training.epsilon == 0.2
    with pytest.raises(ValueError, match="fixes loss_type='grpo', but it is set to 'dapo'"):
        load_recipe(write("algorithm: grpo\nmax_completion_length: 64"), ["--loss_type", "dapo"])
    same = load_recipe(write("algorithm: grpo\nloss_type: grpo\nmax_completion_length: 64"))
    assert same.training.loss_type == "grpo"


@pytest.mark.parametrize("kept", [0, 1])
def test_a_loss_that_takes_each_row_for_an_episode_is_refused_with_short_contexts(
    write: Callable[..., str], kept: int
) -> None:
    text = f"algorithm: sapo\nmax_completion_length: 64\nkeep_last_observations: {kept}"
    with pytest.raises(ValueError, match="keep_last_observations makes several rows"):
        load_recipe(write(text))


def build(name: str, *overrides: str) -> Any:
    return build_task(load_recipe(name, overrides).arguments)


def test_a_recipe_becomes_rows_environment_rewards_and_metrics(write: Callable[..., str]) -> None:
    name = write(
        "tools: [agentr1.tools.search.Search.from_corpus]\nsearch_top_k: 1\n"
        "search_passage_chars: 99\n"
        "train_limit: 3\ndev_limit: 2\ntest_limit: 1\nsystem_prompt: Be brief.\n"
        "process_rewards: [agentr1.rewards.valid_call]\nprocess_reward_weights: [0.5]\n"
        "metrics: [agentr1.rewards.f1_reward, agentr1.rewards.exact_match_reward]\n"
    )
    task = build(name)
    assert [len(rows) for rows in (task.train, task.dev, task.test)] == [3, 2, 1]
    assert task.rewards == [rewards.exact_match_reward]
    assert task.metrics == {
        "f1": rewards.f1_reward,
        "exact_match": rewards.exact_match_reward,
    }
    first, second = task.env_factory(), task.env_factory()
    assert isinstance(first, ToolEnv)
    assert first is not second
    assert first.runner is second.runner  # one index and one concurrency limit for all episodes
    assert first.runner.tools[0].k == 1
    assert first.runner.tools[0].passage_chars == 99
    assert first.process_rewards == ((rewards.valid_call, 0.5),)
    opening = asyncio.run(first.reset(task.train[0]))
    assert [m.role for m in opening] == ["system", "user"]
    assert opening[0].content == "Be brief."


def test_the_limits_of_tools_are_the_recipes(write: Callable[..., str]) -> None:
    limits = {
        **{"timeout": 2.0, "retries": 4, "backoff": 0.25, "deadline": 9.0, "concurrency": 3},
        **{"cache": True, "max_calls": 5, "max_chars": 7},
    }
    assert limits.keys() == {field.name for field in dataclasses.fields(ToolPolicy)}
    words = [word for name, value in limits.items() for word in (f"--tool_{name}", str(value))]
    env = build(write(), *words, "--max_calls", "6").env_factory()
    assert env.runner._policies["calculator"] == ToolPolicy(**limits)
    assert env._calls.max_calls == 6
    assert build(write()).env_factory().runner._policies["calculator"] == ToolPolicy()


@pytest.mark.parametrize("path", ["my_task.MyEnv", "my_task.make"])
def test_an_environment_of_the_users_own_is_used_as_it_is(
    write: Callable[..., str], path: str
) -> None:
    task = build(without_tools(write(f"environment: {path}\n")))
    assert type(task.env_factory()).__name__ == "MyEnv"


def test_what_an_environment_of_the_users_own_would_ignore_is_refused(
    write: Callable[..., str],
) -> None:
    with pytest.raises(ValueError, match=r"no ToolEnv and would ignore \['tools'"):
        build(write("environment: my_task.MyEnv\n"))
    name = without_tools(write("environment: my_task.MyEnv\n"))
    with pytest.raises(ValueError, match=r"would ignore \['tool_tape', 'max_calls'\]"):
        build(name, "--tools", "record:f", "--max_calls", "3")


def test_an_environment_that_breaks_the_contract_is_refused(write: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="Expected: an observation, or the end"):
        build(without_tools(write("environment: my_task.Greedy\n")))


def test_a_tool_of_the_users_own_is_used_as_it_is(write: Callable[..., str]) -> None:
    task = build(write(), "--tools", "my_task.echo")
    assert [s["function"]["name"] for s in task.env_factory().tool_schemas] == ["echo"]


def test_a_process_rewards_parameters_may_have_any_name(write: Callable[..., str]) -> None:
    task = build(write("process_rewards: [my_task.pays]\n"))
    assert task.env_factory().process_rewards[0][1] == 1.0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--dataset", "nowhere"], "dataset folder 'nowhere' was not found"),
        (["--tools", "agentr1.tools.nope"], "tools: .* does not resolve"),
        (["--tools", "my_task.nothing"], "tools: .* neither a tool nor makes one"),
        (["--tools", "my_task.maker"], "tools: 'my_task.maker' made 'no tool'"),
        (["--tools", "agentr1.rewards.f1_reward"], "tools: .* neither a tool nor makes one"),
        (
            ["--tools", "agentr1.tools.search.Search.from_corpus", "--corpus", "nowhere.jsonl"],
            "corpus 'nowhere.jsonl' was not found",
        ),
        (
            ["--tools", "my_task.maker", "--search_passage_chars", "9"],
            "nor makes one from a corpus, search_top_k and search_passage_chars: .*unexpected",
        ),
        (["--environment", "my_task.Needs"], "environment: .*missing a required argument: 'what'"),
        (["--environment", "my_task.nothing"], "environment: .* not a callable"),
        (["--environment", "agentr1.envs.base.Env"], r"abstract, without \['reset', 'step'\]"),
        (["--environment", "my_task.strict"], "environment: .*missing a required argument"),
        (["--rewards", "my_task.nothing"], "rewards: .* not a callable"),
        (["--rewards", "my_task.strict"], "rewards: .*unexpected keyword"),
        (["--metrics", "my_task.strict"], "metrics: .*argument"),
        (["--process_rewards", "my_task.strict"], "process_rewards: .*too many"),
        (["--finish_tool", "nope"], r"finish_tool is 'nope', but the tools are \['calculator'\]"),
        (["--tool_timeout", "0"], "ToolPolicy.timeout is 0.0"),
        (["--train_limit", "0"], "at least 1"),
        (["--tools", "my_task.echo", "my_task.echo"], r"different names, got \['echo', 'echo'\]"),
    ],
)
def test_a_name_that_stands_for_nothing_usable_is_refused(
    write: Callable[..., str], overrides: list[str], said: str
) -> None:
    name = write()
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        build(name, *overrides)


def test_an_environments_own_exception_is_not_dressed_up(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = RecipeArguments(environment="my_task.MyEnv")
    write()
    task = build_task(arguments)

    async def step(self: Any, message: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(task.env_factory()), "step", step)
    with pytest.raises(ZeroDivisionError):
        build_task(arguments)


def test_a_metric_is_called_like_its_function() -> None:
    assert metric_name("a.b.exact_match_reward") == "exact_match"
    assert metric_name("a.b.accuracy") == "accuracy"


# Recording and replaying -----------------------------------------------------------------------

SEARCH = "tools: [agentr1.tools.search.Search.from_corpus]\nsystem_prompt: Search.\n"


@pytest.fixture
def dataset(tmp_path: Path, write: Callable[..., str]) -> str:
    """A dataset with a corpus of its own, to be deleted, and a recipe that searches it."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("train.jsonl", "dev.jsonl", "corpus.jsonl"):
        lines = (find_path("data/quickstart", "data") / name).read_text().splitlines()
        (folder / name).write_text("\n".join(lines[: 400 if name == "corpus.jsonl" else 4]))
    return write(SEARCH + "dataset: own\n")


@pytest.mark.parametrize("joined", [False, True])
def test_an_evaluation_replayed_without_its_retriever_is_the_recorded_one(
    dataset: str, tmp_path: Path, codec: Codec, joined: bool
) -> None:
    titles = [
        json.loads(line)["title"] for line in (tmp_path / "own/corpus.jsonl").open(encoding="utf-8")
    ]

    def evaluated(way: str) -> tuple[Any, list[Scored]]:
        words = (
            [f"--tools={way}:new/tape.jsonl"] if joined else ["--tools", f"{way}:new/tape.jsonl"]
        )
        task = build(dataset, *words)
        calls = [render_call("search", {"query": title}) for title in titles[:3]]
        scripts = {row["question"]: [*calls, "42"] for row in task.dev}
        scored = evaluate_rows(
            task.dev,
            task.env_factory,
            codec,
            ScriptedPolicy(codec, scripts),
            limits=Limits(max_completion_length=10_000),
            metrics=task.metrics,
        )
        return task.env_factory().tool_schemas, scored

    schemas, recorded = evaluated("record")
    assert titles[0] in recorded[0].trajectory.turns[0].observation[0].content
    (tmp_path / "own/corpus.jsonl").unlink()
    again, replayed = evaluated("replay")
    assert again == schemas
    for before, after in zip(recorded, replayed, strict=True):
        trajectory = dataclasses.replace(after.trajectory, seconds=before.trajectory.seconds)
        assert dataclasses.replace(after, trajectory=trajectory) == before


def test_a_recipe_may_name_its_recording(dataset: str, tmp_path: Path) -> None:
    build(dataset, "--tool_tape", "record:tape.jsonl")
    (tmp_path / "own/corpus.jsonl").unlink()
    (tmp_path / dataset).write_text(
        (tmp_path / dataset).read_text() + "tool_tape: replay:tape.jsonl\ntool_replay_latency: 2\n"
    )
    runner = build(dataset).env_factory().runner
    assert (runner.tools[0].name, runner.latency) == ("search", 2.0)
    with pytest.raises(FileNotFoundError, match="recording of tools 'none' was not found; looked"):
        build(dataset, "--tools", "replay:none")


def test_other_values_of_tools_still_replace_the_recipes(write: Callable[..., str]) -> None:
    recipe = load_recipe(write(), ["--tools", "a.b", "c.d", "--tool_tape", "record:f"])
    assert (recipe.arguments.tools, recipe.arguments.tool_tape) == (["a.b", "c.d"], "record:f")
    recipe = load_recipe(write(), ["--tools", "record:f", "--max_turns", "2"])
    assert (len(recipe.arguments.tools), recipe.training.max_turns) == (1, 2)


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("tool_tape: tape.jsonl\n", [], "tool_tape must be record:FILE or replay:FILE"),
        ("", ["--tools", "replay:"], "tool_tape must be record:FILE or replay:FILE"),
        ("", ["--tool_replay_latency", "-1"], "tool_replay_latency must be 0 or more"),
        ("tools: ['record:f', my_task.echo]\n", [], "write tool_tape: record:f beside them"),
        ("", ["--tools", "my_task.echo", "replay:f"], "--tools replay:f alone on the command line"),
        ("", ["--tools", "replay:f", "my_task.echo"], "my_task.echo"),
    ],
)
def test_a_recording_asked_for_in_the_wrong_way_is_refused(
    write: Callable[..., str], text: str, overrides: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        load_recipe(write(text), overrides)


def test_every_key_of_tools_is_documented_with_its_default() -> None:
    text = (search_roots()[1] / "docs" / "tools.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", text, re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(RecipeArguments)}
    keys = {name for name in fields if name.startswith("tool_")} | {"max_calls"}
    assert keys == table.keys() | {"tool_tape", "tool_replay_latency"}
    assert all(f"`{key}" in text for key in keys)
    for key, default in table.items():
        assert yaml.safe_load(default.replace("none", "null")) == fields[key]


@pytest.mark.slow
def test_the_documented_commands_replay_what_they_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (search_roots()[1] / "docs" / "tools.md").read_text(encoding="utf-8")
    commands = re.findall(r"^agentr1 (eval .*)$", text, re.MULTILINE)
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)

    def episodes(command: str) -> tuple[list[Any], list[float]]:
        assert cli.main([*command.split(), "--use_cpu", "true"]) == 0
        (file,) = (tmp_path / "runs/eval/quickstart/grpo/latest").glob("evaluation/after.jsonl")
        found = [json.loads(line) for line in file.open(encoding="utf-8")]
        for episode in found:
            del episode["wall_seconds"], episode["trajectory"]["seconds"]
        turns = [turn for episode in found for turn in episode["trajectory"]["turns"]]
        return found, [logprob for turn in turns for logprob in turn.pop("logprobs")]

    recorded, logprobs = episodes(commands[0])
    assert any(turn["info"]["calls"] for e in recorded for turn in e["trajectory"]["turns"])
    replayed, again = episodes(f"{commands[1]} --corpus deleted.jsonl")
    assert replayed == recorded
    assert again == pytest.approx(logprobs, abs=1e-4)  # other episodes share a batch
