"""What the README and the pages of docs show works: Python runs, commands and files exist."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import shlex
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from trl import ModelConfig

from agentr1 import Env, Message, StopReason, ToolError, check_env
from agentr1.cli import VERBS, main
from agentr1.config import AgentConfig
from agentr1.engines.base import Sampling
from agentr1.recipe import find_recipe, load_recipe
from agentr1.recipe_arguments import RecipeArguments
from agentr1.rollout import Limits, rollout
from agentr1.task import build_task
from agentr1.types import Trajectory, Turn
from fakes import ScriptedPolicy

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DRY = "--dry-run"
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))


def run_block(holding: str) -> dict[str, Any]:
    (block,) = [block for block in PYTHON if holding in block]
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)  # the README is ours
    return names


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 150
    assert len(PYTHON) == 2


def test_the_tool_answers_and_tells_the_model_its_mistake() -> None:
    population = run_block("def population")["population"]
    assert asyncio.run(population(town="Keld")) == "1100"
    with pytest.raises(ToolError, match="Odrun"):
        asyncio.run(population(town="Nowhere"))


def test_the_environment_keeps_the_contract_and_can_be_won(codec: Any) -> None:
    guess: type[Env] = run_block("class Guess")["Guess"]
    row = {"id": "1", "number": 7}
    asyncio.run(check_env(guess, row, ["3", "9", "7"]))
    policy = ScriptedPolicy(codec, {"Guess my number": ["3", "9", "7"]})
    limits, sampling = Limits(max_turns=5, max_completion_length=512), Sampling(max_tokens=1)
    played = asyncio.run(rollout(row, guess(), codec, policy, limits=limits, sampling=sampling))
    asyncio.run(check_env(guess, row, ["", "seven", "\u00b2", "-7", "7"]))  # a digit, no number
    assert played.stop_reason is StopReason.ENVIRONMENT
    assert played.process_rewards == (0.0, 0.0, 1.0)
    assert Message("user", "higher") in played.messages


def test_the_training_in_python_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    names: dict[str, Any] = {}
    exec(compile(block, "python.md", "exec"), names)
    logged = names["trainer"].state.log_history[-1]
    assert logged["step"] == 2
    assert logged["rollout/tools/search/calls"] > 0
    assert (tmp_path / "runs" / "python" / "final" / "model.safetensors").is_file()


def test_rewards_of_ones_own_are_taken_by_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "tools_page.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    named = load_recipe("quickstart").arguments
    named = dataclasses.replace(
        named,
        rewards=["tools_page.short"],
        metrics=["tools_page.short"],
        process_rewards=["tools_page.used"],
        process_reward_weights=None,
    )
    task = build_task(named)
    turn = Turn((1,), (-0.5,), Message("assistant", "Keld"), prompt_ids=(2,))
    brief = Trajectory({"id": "1"}, (), (turn,), StopReason.ENVIRONMENT)
    assert [reward([brief], level=["1"]) for reward in task.rewards] == [[1.0]]
    assert task.metrics["short"]([brief]) == [1.0]
    assert dict(task.env_factory().process_rewards)[import_module("tools_page").used] == 1.0


@pytest.mark.parametrize("page", ["data.md", "evaluation.md", "multihop.md", "retrieval.md"])
def test_verbs_and_options_of_a_page_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    commands = [*map(shlex.split, re.findall(r"^ *agentr1 (.+)", text, re.MULTILINE))]
    assert commands
    keys = {f.name for k in (RecipeArguments, AgentConfig, ModelConfig) for f in fields(k)}
    for verb, *words in commands:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        options = {*re.findall(r"--[\w-]+", capsys.readouterr().out), *(f"--{k}" for k in keys)}
        assert {word for word in words if word.startswith("--")} <= options, (verb, words)


def test_own_questions_go_the_way_that_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    index, demonstrate, _, dry, *_ = [shlex.split(line)[1:] for line in block.splitlines()]
    assert (index[0], demonstrate[0], dry[0], dry[-1]) == ("index", "demonstrate", "train", DRY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "corpus.jsonl").write_text(
        '{"id": "1", "title": "Keld", "text": "Keld is ruled by Oda."}\n'
        '{"id": "2", "title": "Oda", "text": "Oda was born in Varn."}\n'
    )
    row = '{"id": "%s", "question": "Where was %sruler of Keld born?", "answers": ["Varn"], '
    row += '"supporting_titles": ["Keld", "Oda"]}\n'
    (tmp_path / "mine" / "train.jsonl").write_text(
        "".join(row % (number, "the ") for number in range(16))
    )
    (tmp_path / "mine" / "dev.jsonl").write_text(row % ("b", "any "))
    monkeypatch.chdir(tmp_path)
    assert main(index) == 0
    assert main(demonstrate) == 0
    assert '"search"' in (tmp_path / "mine" / "demonstrations.jsonl").read_text()
    policy = ("--model_name_or_path", str(ROOT / "data" / "quickstart" / "policy"))
    assert main([*dry, *policy, "--use_cpu", "true", "--bf16", "false"]) == 0
    assert "16 train, 1 dev, 1 test (those of dev" in capsys.readouterr().out


def test_make_targets_recipes_and_verbs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make (\w+)", SHELL))
    assert {"train", "test", "play", "eval"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for name in re.findall(r"RECIPE=([\w/]+)", SHELL):
        assert find_recipe(name).is_file()
    for verb in re.findall(r"`agentr1 (\w+)", README):
        assert verb in VERBS


def test_the_paths_it_names_exist() -> None:
    for path in re.findall(r"`((?:recipes|docs|data)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path


def test_a_recipe_with_the_environment_needs_rows_with_ids_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = [block for block in PYTHON if "class Guess" in block]
    (tmp_path / "readme_module.py").write_text(block)
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text('{"id": "1", "number": 7}\n')
    monkeypatch.syspath_prepend(tmp_path)
    named = RecipeArguments(
        dataset=str(tmp_path),
        environment="readme_module.Guess",
        rewards=["agentr1.rewards.no_reward"],
        metrics=["agentr1.rewards.environment_reward"],
    )
    task = build_task(named)
    assert [row["number"] for row in task.train] == [7]
    assert "environment" in task.metrics
    with pytest.raises(ValueError, match="no ToolEnv and would ignore .*tools"):
        build_task(dataclasses.replace(named, tools=["agentr1.tools.calculator.calculator"]))
