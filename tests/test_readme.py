"""What the README and docs/python.md show works: Python runs, commands and files exist."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from agentr1 import Env, Message, StopReason, ToolError, check_env
from agentr1.cli import VERBS
from agentr1.engines.base import Sampling
from agentr1.recipe import build_task, find_recipe
from agentr1.recipe_arguments import RecipeArguments
from agentr1.rollout import Limits, rollout
from fakes import ScriptedPolicy

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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
