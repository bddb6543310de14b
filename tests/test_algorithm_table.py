"""The table over algorithms: what each gained, by seed, and at what cost."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from agentr1.advantages import TurnRewards
from agentr1.algorithm_table import RECIPES, episodes, main, plan, records, table
from agentr1.algorithms import ALGORITHMS
from agentr1.config import AgentConfig
from agentr1.credit_config import CreditConfig
from grids import finish_run
from test_ablate import RECIPE, answered

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "recipes" / "toy"
    folder.mkdir(parents=True)
    for algorithm in ("grpo", "rloo"):
        (folder / f"{algorithm}.yaml").write_text(RECIPE.format(algorithm=algorithm))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_table_has_one_line_per_recipe(here: Path) -> None:
    cells = plan("toy", here / "out", [1, 2], ["grpo", "rloo"])
    for seed, right in ((1, 6), (2, 8)):
        finish_run(cells[0].runs[seed], answered(4), answered(right), seconds=100.0 * seed)
    header, _, grpo, rloo = (
        [c.strip() for c in line.split("|")[1:-1]] for line in table(cells).splitlines()
    )
    assert header == ["recipe", "before", "after, seeds 1, 2", "gain", "seconds", "episodes"]
    assert grpo[:3] == ["toy/grpo", ".400", ".600, .800"]
    assert grpo[3].startswith("+.300 [+.")
    assert grpo[4:] == ["150", "28"]
    assert rloo == ["toy/rloo", "-", "-, -", "-", "-", "28"]
    row = json.loads(json.dumps(records(cells)))[0]
    assert row["recipe"] == "toy/grpo"
    assert row["values"] == {"1": 0.6, "2": 0.8}
    assert row["gain"] == pytest.approx(0.3)
    assert row["before"] == pytest.approx(0.4)
    assert row["gain_ci95"][0] < 0.3 < row["gain_ci95"][1]
    assert (row["seconds"], row["episodes"]) == (150.0, 28)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 40 * 96),
        ({"gradient_accumulation_steps": 2}, 40 * 192),
        ({"max_steps": 80, "num_iterations": 2}, 40 * 96),
        # One batch of 192 episodes serves two steps.
        ({"steps_per_generation": 2}, 20 * 192),
        ({"spare_rollouts": 1}, 40 * 108),
        ({"max_steps": -1}, None),
    ],
)
def test_episodes_are_those_that_the_configuration_asks_for(
    tmp_path: Path, settings: dict[str, int], expected: int | None
) -> None:
    given = {"max_steps": 40, "per_device_train_batch_size": 96, "num_generations": 8} | settings
    config = AgentConfig(str(tmp_path), use_cpu=True, bf16=False, **given)
    assert episodes(config) == expected


def test_a_report_is_printed_and_saved(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["toy", "--recipes", "grpo", "rloo", "--report", "--seeds", "4"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("2 runs: 2 not started\n")
    place = here / "runs" / "algorithms" / "toy"
    assert (place / "algorithms.md").read_text() in shown
    saved = json.loads((place / "algorithms.json").read_text())
    assert [row["recipe"] for row in saved["rows"]] == ["toy/grpo", "toy/rloo"]


def test_without_names_the_table_has_the_default_recipes_that_the_task_has(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here / "recipes" / "toy"
    (folder / "odd.yaml").write_text(RECIPE.format(algorithm="remax"))
    (folder / "ppo.yaml").write_text(RECIPE.format(algorithm="ppo"))
    assert main(["toy", "--report", "--seeds", "4"]) == 0
    saved = json.loads((here / "runs" / "algorithms" / "toy" / "algorithms.json").read_text())
    assert [row["recipe"] for row in saved["rows"]] == ["toy/grpo", "toy/ppo", "toy/rloo"]
    for name in ("grpo", "ppo", "rloo"):
        (folder / f"{name}.yaml").unlink()
    assert main(["toy", "--report"]) == 2
    said = capsys.readouterr().err
    assert "'toy' has none of the recipes grpo, ppo" in said
    assert "it has odd; name some of these with --recipes" in said
    assert main(["nowhere", "--report"]) == 2
    assert "no recipe 'nowhere'" in capsys.readouterr().err


def test_a_recipe_is_planned_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "--recipes", "grpo", "rloo", "grpo"]) == 2
    assert "--recipes must differ, got grpo, rloo, grpo" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_what_the_recipes_name_is_looked_for_before_anything_runs(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["toy", "--recipes", "grpo", "rloo", "--dataset", "nowhere"]) == 2
    assert "dataset folder 'nowhere' was not found" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_the_recipes_of_the_table_are_there() -> None:
    for name in RECIPES:
        assert (ROOT / "recipes" / "quickstart" / f"{name}.yaml").is_file(), name


# The page --------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_page_says_of_every_algorithm_what_its_row_says(name: str) -> None:
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
    _, _, papers, _, loss, _, needs, _ = (cell.strip() for cell in line.split("|"))
    row = ALGORITHMS[name]
    assert set(papers.split(", ")) == set(re.findall(r"arXiv ([\d.]+)", row.paper))
    assert loss.startswith(f"`{row.settings['loss_type']}`")
    assert needs == ("critic" if row.needs_critic else "group" if row.needs_group else "")


def test_the_page_names_every_setting_of_credit() -> None:
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert {f.name for f in dataclasses.fields(CreditConfig)} <= named


def test_the_algorithm_on_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentr1.algorithms.ALGORITHMS", ALGORITHMS.copy())
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    space: dict[str, Any] = {}
    exec(code, space)
    config = AgentConfig(str(tmp_path), use_cpu=True, bf16=False, algorithm="bounded")
    assert config.loss_type == "dr_grpo"
    paid = TurnRewards(torch.tensor([3.0, 0.0]), torch.zeros(2, 2), torch.tensor([1, 2]), 2)
    assert space["bounded"](paid).tolist() == [[1.0, 0.0], [-1.0, -1.0]]
