"""Every recipe that is shipped: well formed, resolvable, and runnable for two steps on the CPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import SFTConfig

from agentr1.algorithms import ALGORITHMS
from agentr1.config import AgentConfig
from agentr1.recipe import find_recipe, load_recipe
from agentr1.task import build_task
from trainers import save_policy

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(
    path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate"
)
SFT = [path for path in RECIPES if path.stem == "sft"]
RL = [path for path in RECIPES if path not in SFT]
# Where there is no GPU and no data but the quickstart's.
HERE = [
    *("--bf16", "false", "--use_cpu", "true"),
    *("--dataset", "data/quickstart", "--corpus", "data/quickstart/corpus.jsonl"),
]
SMALL = [
    *("--max_steps", "2", "--warmup_steps", "0", "--report_to", "none", "--dtype", "float32"),
    *("--train_limit", "8", "--dev_limit", "2", "--test_limit", "4"),
    *("--gradient_accumulation_steps", "1", "--save_steps", "2", "--logging_steps", "1"),
]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


each_recipe = pytest.mark.parametrize("path", RECIPES, ids=name_of)


def test_the_recipes_are_these_many() -> None:
    assert len(RECIPES) == 35, [name_of(path) for path in RECIPES]
    assert {path.parent.parent for path in RECIPES} == {ROOT / "recipes"}


def test_every_algorithm_has_a_recipe() -> None:
    texts = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in RL]
    assert {keys.get("algorithm") for keys in texts} >= set(ALGORITHMS)


@each_recipe
def test_a_recipe_opens_with_purpose_hardware_command_and_result(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line.split(":")[0] for line in lines[:4]]
    assert header == ["# Purpose", "# Hardware", "# Command", "# Measured"]
    assert lines[4] == ""
    assert "not measured" in lines[3] or re.search(r"\d{4}-\d{2}-\d{2}", lines[3])
    assert len(lines) <= 45


@each_recipe
def test_the_command_of_a_recipe_is_a_make_target_that_runs_it(path: Path) -> None:
    command = path.read_text(encoding="utf-8").splitlines()[2].split(": ", 1)[1].split()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert command[0] == "make"
    assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE)
    variables = dict(word.split("=", 1) for word in command[2:])
    if "RECIPE" in variables:
        assert find_recipe(variables["RECIPE"]) == path
    else:  # a target that names its recipe itself
        assert f"agentr1 sft {name_of(path)} " in makefile
    if "ACCELERATE" in variables:
        assert (ROOT / "recipes" / "accelerate" / f"{variables['ACCELERATE']}.yaml").is_file()


@each_recipe
def test_a_recipe_is_flat(path: Path) -> None:
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert not [key for key, value in keys.items() if isinstance(value, dict)]


@each_recipe
def test_a_recipe_loads_and_all_its_names_resolve(path: Path) -> None:
    kind = SFTConfig if path in SFT else AgentConfig
    recipe = load_recipe(str(path), HERE, training=kind)
    if path in RL:
        recipe.training.check_for_environment()
    task = build_task(recipe.arguments)
    assert task.train
    assert task.rewards
    assert task.metrics
    assert task.env_factory().tool_schemas


@each_recipe
def test_a_recipe_restates_no_default_of_ours(path: Path) -> None:
    """What a recipe sets is what makes it this recipe."""
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    defaults = {f: d for f, d in vars(AgentConfig).items() if f in AgentConfig.__annotations__}
    assert not [k for k, v in keys.items() if k in defaults and v == defaults[k]]


# Two steps -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], tokenizer: Any
) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"), make_model(), tokenizer)


@pytest.mark.smoke
@pytest.mark.parametrize("path", RL, ids=name_of)
def test_two_steps_of_a_recipe(path: Path, policy: Path, tmp_path: Path) -> None:
    from agentr1.train import train

    keys = yaml.safe_load(path.read_text())
    asked = keys.get("steps_per_generation")  # in micro-batches, of which a step has one here
    updates = asked // keys.get("gradient_accumulation_steps", 1) if asked else 1
    batch = ["--per_device_train_batch_size", "4", "--num_generations", "2"]
    batch += ["--steps_per_generation", str(updates)]
    limits = ["--max_turn_tokens", "16", "--max_completion_length", "512", "--eval_steps", "2"]
    if "context_tokens:" in path.read_text():  # a window in this tokenizer's tokens
        limits += ["--context_tokens", "480"]
    folder = train(
        str(path),
        [
            *(*HERE, *SMALL, *batch, *limits),
            *("--trajectory_steps", "1", "--output_dir", str(tmp_path / "run")),
            *("--model_name_or_path", str(policy)),
        ],
    )
    assert folder == tmp_path / "run"
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged if "loss" in record] == [1, 2]
    played = [1] if updates == 2 else [1, 2]
    assert [record["step"] for record in logged if "reward" in record] == played
    assert all("rollout/turns" in record for record in logged if "reward" in record)
    evaluation = json.loads((folder / "eval.json").read_text())
    assert evaluation["before"]["n"] == evaluation["after"]["n"] == 4
    weights = "adapter_model" if "use_peft: true" in path.read_text() else "model"
    assert (folder / "final" / f"{weights}.safetensors").exists()
    assert (folder / "checkpoint-2" / "trainer_state.json").exists()
    assert len(list((folder / "trajectories").iterdir())) == len(played)
    assert (folder / "recipe.yaml").read_text() == path.read_text()


@pytest.mark.smoke
@pytest.mark.parametrize("path", SFT, ids=name_of)
def test_two_steps_of_fine_tuning(path: Path, policy: Path, tmp_path: Path) -> None:
    from agentr1.sft import sft

    demonstrations = tmp_path / "demonstrations.jsonl"
    messages = [{"role": r, "content": "x"} for r in ("user", "assistant", "tool", "assistant")]
    demonstrations.write_text((json.dumps({"messages": messages}) + "\n") * 4)
    folder = sft(
        str(path),
        [
            *(*HERE, *SMALL, "--per_device_train_batch_size", "2"),
            *("--demonstrations", str(demonstrations), "--output_dir", str(tmp_path / "run")),
            *("--model_name_or_path", str(policy)),
        ],
    )
    assert (folder / "final" / "model.safetensors").exists()
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged if "loss" in record] == [1, 2]
