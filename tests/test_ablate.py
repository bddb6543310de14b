"""The ablation: which runs there are, and how what they left becomes the paper's table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentr1 import train
from agentr1.ablate import COLUMNS, ROWS, main, plan, plot, process_options, records, table
from agentr1.cells import Run, State, check_cells, runs_of, state_of
from agentr1.recipe import load_recipe
from grids import finish_run
from trainers import save_policy

RECIPE = """\
model_name_or_path: policy
dataset: data
tools: [agentr1.tools.calculator.calculator]
num_generations: 2
per_device_train_batch_size: 4
max_turns: 2
max_turn_tokens: 6
max_completion_length: 128
algorithm: {algorithm}
max_steps: 7
gradient_checkpointing: false
bf16: false
use_cpu: true
report_to: none
"""
PAYING = """\
process_rewards: [agentr1.rewards.new_supporting_title, agentr1.rewards.repeated_query]
process_reward_weights: [0.5, 0.1]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the recipes of a task."""
    folder = tmp_path / "recipes" / "toy"
    folder.mkdir(parents=True)
    for algorithm in ("grpo", "ppo"):
        (folder / f"{algorithm}.yaml").write_text(RECIPE.format(algorithm=algorithm))
    (folder / "process.yaml").write_text(RECIPE.format(algorithm="grpo") + PAYING)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def furnished(here: Path, make_model: Callable[..., Any], tokenizer: Any) -> Path:
    """The same with the policy and the rows that the recipes name."""
    save_policy(here / "policy", make_model(), tokenizer)
    (here / "data").mkdir()
    row = {"question": "1 + 1?", "answer": "2", "supporting_titles": ["Sums"]}
    for split in ("train", "dev", "test"):
        lines = [json.dumps({"id": f"{split}-{i}", **row}) for i in range(8)]
        (here / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    return here


def load(run: Run) -> Any:
    return load_recipe(run.recipe, run.overrides)


def test_the_plan_has_every_mask_with_and_without_process_rewards(here: Path) -> None:
    cells = plan("toy", here / "out", [1, 2, 3], ["--learning_rate", "0.5"])
    runs = runs_of(cells.values())
    assert len(runs) == len({run.folder for run in runs}) == (4 + 2) * 2 * 3
    recipes = [load(run) for run in runs]
    found = {
        (
            recipe.training.algorithm,
            recipe.training.loss_mask,
            recipe.training.advantage_alignment,
            bool(recipe.arguments.process_rewards),
            recipe.training.seed,
        )
        for recipe in recipes
    }
    switches = ("policy", "all")
    ppo = {
        ("ppo", m, a, p, s) for m in switches for a in switches for p in (0, 1) for s in (1, 2, 3)
    }
    grpo = {("grpo", m, "policy", p, s) for m in switches for p in (0, 1) for s in (1, 2, 3)}
    assert found == ppo | grpo
    paid = next(recipe for recipe in recipes if recipe.arguments.process_rewards)
    assert paid.arguments.process_reward_weights == [0.5, 0.1]
    assert all(recipe.training.learning_rate == 0.5 for recipe in recipes)
    assert {run.steps for run in runs} == {7}


def test_a_recipe_that_pays_turns_is_silenced_for_the_other_column(here: Path) -> None:
    recipe = load_recipe("toy/process")
    without, paying = process_options(recipe, "toy/process")
    assert paying == []
    silent = load_recipe("toy/process", without)
    assert silent.arguments.process_reward_weights == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"neither toy/ppo nor toy/grpo has process_rewards"):
        process_options(load_recipe("toy/ppo"), "toy/grpo")


def test_the_donor_of_process_rewards_is_read_with_the_overrides_too(here: Path) -> None:
    donor = here / "recipes" / "toy" / "process.yaml"
    donor.write_text(donor.read_text().replace("max_turns: 2", "max_turns: 0"))
    cells = plan("toy", here / "out", [1], ["--max_turns", "3"])
    assert {load(run).training.max_turns for run in runs_of(cells.values())} == {3}
    with pytest.raises(ValueError, match="max_turns"):
        plan("toy", here / "out", [1])


# The table -------------------------------------------------------------------------------------

QUESTIONS = [f"q{i}" for i in range(10)]


def answered(count: int) -> dict[str, float]:
    """The first so many questions are right."""
    return {q: float(i < count) for i, q in enumerate(QUESTIONS)}


def finish(here: Path, right: dict[str, int]) -> Any:
    """Leave runs whose every seed has so many right answers, by place; others are missing."""
    cells = plan("toy", here / "out", [1, 2, 3])
    for cell in cells.values():
        for run in cell.runs.values():
            place = run.name.rpartition("/")[0]
            if place in right:
                finish_run(run, answered(3), answered(right[place]))
    return cells


def test_the_table_has_the_papers_shape_and_dashes_for_what_is_missing(here: Path) -> None:
    cells = finish(
        here,
        {
            "ppo/both/outcome": 8,
            "ppo/no_advantage_mask/outcome": 5,
            "ppo/both/process": 9,
            "grpo/no_loss_mask/outcome": 6,
        },
    )
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table(cells).splitlines()]
    assert lines[0][:3] == ["", "exact match", "to all masks"]
    assert [line[0] for line in lines[2:]] == [masks.label for masks in ROWS]
    both, no_advantage, _, _, grpo, no_loss = lines[2:]
    assert both[1].startswith(".800 [")
    assert both[2] == ""
    assert both[3].startswith(".900 [")
    assert both[5] == "3 + 3"
    assert no_advantage[1].startswith(".500 [")
    assert no_advantage[2].startswith("-.300 [-.6")
    assert no_advantage[3:] == ["-", "-", "3 + 0"]
    assert grpo == ["GRPO, loss mask on", "-", "", "-", "", "0 + 0"]
    assert no_loss[1].startswith(".600 [")
    assert no_loss[2] == "-"  # nothing to compare it with


def test_the_records_hold_every_cell(here: Path) -> None:
    cells = finish(here, {"ppo/both/outcome": 8, "ppo/none/outcome": 2})
    rows = json.loads(json.dumps(records(cells)))
    assert len(rows) == len(ROWS) * len(COLUMNS)
    row = next(r for r in rows if r["label"] == "PPO, both off" and not r["process_rewards"])
    assert (row["loss_mask"], row["advantage_alignment"]) == ("all", "all")
    assert row["mean"] == pytest.approx(0.2)
    assert row["difference"] == pytest.approx(-0.6)
    low, high = row["difference_ci95"]
    assert low < -0.6 < high
    assert row["values"] == {"1": 0.2, "2": 0.2, "3": 0.2}


def test_the_plot_is_drawn_from_part_of_the_runs(here: Path) -> None:
    cells = finish(here, {"ppo/both/outcome": 8, "grpo/no_loss_mask/process": 6})
    plot(cells, here / "ablation")
    assert (here / "ablation.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (here / "ablation.svg").read_text()


def test_a_report_shows_and_saves_what_there_is(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = here / "out"
    finish(here, {"ppo/both/outcome": 8})
    assert main(["toy", "--report", "--out", str(place)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("36 runs: 33 not started, 3 done\n")
    assert "| PPO, both masks" in shown
    saved = json.loads((place / "ablation.json").read_text())
    assert saved["command"].startswith("agentr1 ablate toy --report")
    assert (saved["task"], saved["metric"], len(saved["rows"])) == ("toy", "exact_match", 12)
    assert (place / "ablation.md").read_text() in shown
    assert (place / "ablation.svg").exists()


def test_a_missing_matplotlib_is_said_before_anything_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["toy"]) == 2
    assert "pip install 'agentr1[plot]', or give --no-plot" in capsys.readouterr().err
    assert not (here / "runs").exists()
    assert main(["toy", "--report", "--no-plot"]) == 0
    assert not (here / "runs" / "ablation" / "toy" / "ablation.png").exists()


def test_a_mistake_shows_before_anything_runs(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in [
        (["toy", "--no_such_key", "1"], "no_such_key"),
        (["nowhere"], "no recipe 'nowhere/ppo'"),
        (["toy", "--process-recipe", "toy/grpo"], "--process-recipe"),
        (["toy", "--loss_mask", "all"], "leave ['--loss_mask'] out"),
        (["toy", "--advantage-alignment=all"], "leave ['--advantage-alignment'] out"),
        (["toy", "--algorithm", "rloo"], "differ by algorithm, advantage_alignment, loss_mask"),
    ]:
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tools", "agentr1.tools.abacus"], "'agentr1.tools.abacus' does not resolve"),
        (["--environment", "agentr1.envs.Nowhere"], "environment: 'agentr1.envs.Nowhere'"),
        (["--rewards", "agentr1.rewards.praise"], "has no 'praise'"),
        (["--dataset", "nowhere"], "dataset folder 'nowhere' was not found"),
        (["--model_name_or_path", "no/where"], "no/where"),
        (["--context_tokens", "3"], "context_tokens"),
    ],
)
def test_what_a_recipe_names_is_looked_for_before_anything_runs(
    furnished: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["toy", "--no-plot", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (furnished / "runs").exists()


def test_equal_recipes_are_looked_at_once(furnished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    resolve = train.resolve
    monkeypatch.setattr(train, "resolve", lambda recipe: seen.append(resolve(recipe)))
    cells = plan("toy", furnished / "out", [1, 2, 3])
    check_cells(cells.values())
    assert len(seen) == 2  # without and with process rewards


# Real runs -------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_two_real_runs(
    furnished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of GRPO without and with process rewards; after that nothing is left to do."""
    here = furnished
    monkeypatch.setattr("agentr1.ablate.ROWS", ROWS[4:5])  # GRPO with its mask
    source = str(Path(__file__).resolve().parents[1] / "src")
    monkeypatch.setenv("PYTHONPATH", source)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    short = ["--max_steps", "1", "--save_strategy", "no", "--trajectory_steps", "1"]
    command = ["toy", "--seeds", "1", "--jobs", "2", "--no-plot", *short]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 done" in shown
    assert "GRPO, loss mask on" in shown
    saved = json.loads((here / "runs/ablation/toy/ablation.json").read_text())
    assert [(row["process_rewards"], row["seeds"]) for row in saved["rows"]] == [
        (False, [1]),
        (True, [1]),
    ]
    assert saved["environments"][0]["versions"]["trl"]
    place = here / "runs" / "ablation" / "toy" / "grpo" / "loss_mask"
    assert yaml.safe_load((place / "process/seed1/recipe.yaml").read_text())["algorithm"] == "grpo"
    assert "--process_rewards" in (place / "process/seed1/command.txt").read_text()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 runs were done before" in shown
    assert "started" not in shown
    cells = plan("toy", Path("runs/ablation/toy"), [1], short)
    assert [state_of(run) for run in runs_of(cells.values())] == [State.DONE] * 2
