"""`agentr1 algorithms`: what each algorithm gains over the policy it starts from, same budget.

Trains the recipes of a task with several seeds each and prints a table for `docs/algorithms.md`.
Run again, it does what is missing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentr1.cells import (
    Cell,
    check_cells,
    header,
    interval_record,
    markdown,
    number,
    plan_cell,
    remark,
    runs_of,
    with_interval,
)
from agentr1.commandline import guarded, split_arguments
from agentr1.config import AgentConfig
from agentr1.grid import carry_out, check_options, grid_parser
from agentr1.recipe import find_recipe, load_recipe, metric_name, search_roots
from agentr1.runs import write_json, write_text

OUT = Path("runs/algorithms")
RECIPES = (
    *("grpo", "ppo", "rloo", "reinforce_pp", "reinforce_pp_baseline"),
    *("gigpo", "steppo", "turn_loo"),
)
"""Compared unless recipes are named: those of them that the task has."""


def default_recipes(task: str) -> list[str]:
    """Those of `RECIPES` that a task has, in that order.

    Raises:
        FileNotFoundError: it has none of them, or there is no such task.
    """
    there = {
        path.stem for root in search_roots() for path in (root / "recipes" / task).glob("*.yaml")
    }
    if not there:
        find_recipe(task)  # says which recipes there are
    found = [name for name in RECIPES if name in there]
    if not found:
        raise FileNotFoundError(
            f"task {task!r} has none of the recipes {', '.join(RECIPES)}, it has "
            f"{', '.join(sorted(there))}; name some of these with --recipes"
        )
    return found


def plan(
    task: str,
    out: Path,
    seeds: Sequence[int],
    recipes: Sequence[str],
    overrides: Sequence[str] = (),
) -> list[Cell]:
    """Name the runs of every recipe, and see that it loads.

    Raises:
        ValueError, FileNotFoundError: a mistake in a recipe or an override.
    """
    if len(set(recipes)) < len(recipes):
        raise ValueError(f"--recipes must differ, got {', '.join(recipes)}")
    cells = []
    for name in recipes:
        recipe = load_recipe(f"{task}/{name}", overrides)
        keys = {"recipe": recipe.name, "episodes": episodes(recipe.training)}
        metric = metric_name(recipe.arguments.metrics[0])
        cells.append(
            plan_cell(recipe, overrides, seeds, out=out, place=name, metric=metric, keys=keys)
        )
    return cells


def episodes(config: AgentConfig) -> int | None:
    """Episodes of a run on one process, spare ones included; refilled groups come on top.

    None where the recipe counts epochs.
    """
    if config.max_steps <= 0:
        return None
    batch, parts = config.generation_batch_size, config.steps_per_generation
    assert batch is not None  # TRL has filled both in
    assert parts is not None
    micro_batches = config.max_steps * config.gradient_accumulation_steps
    groups = batch // (config.num_generations or 1)
    generations = math.ceil(micro_batches / (parts * config.num_iterations))
    return generations * (batch + groups * config.spare_rollouts)


def table(cells: Sequence[Cell]) -> str:
    """One line per recipe; what no run has given yet is `-`."""
    seeds = ", ".join(str(seed) for seed in cells[0].runs)
    columns = ["recipe", "before", f"after, seeds {seeds}", "gain", "seconds", "episodes"]
    lines = []
    for cell in cells:
        scores = cell.scores()
        after = [_mean(scores[seed]) if seed in scores else None for seed in cell.runs]
        before, seconds = cell.mean("before"), cell.seconds()
        lines.append(
            [
                cell.keys["recipe"],
                number(before.mean if before else None),
                ", ".join(number(value) for value in after),
                with_interval(cell.gain(), "+"),
                "-" if seconds is None else f"{seconds:.0f}",
                str(cell.keys["episodes"] or "-"),
            ]
        )
    return markdown(columns, lines)


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def records(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every recipe for `algorithms.json`."""
    return [
        cell.record()
        | interval_record("before", cell.mean("before"))
        | interval_record("gain", cell.gain())
        | {"seconds": cell.seconds()}
        for cell in cells
    ]


def algorithms(args: argparse.Namespace, overrides: Sequence[str], argv: Sequence[str]) -> None:
    """Do the runs of the table, or report on them; see `grid.carry_out` for what it raises."""
    check_options(args, overrides)
    args.out = args.out or OUT / args.task
    recipes = args.recipes or default_recipes(args.task)
    cells = plan(args.task, args.out, args.seeds, recipes, overrides)
    if not args.report:
        check_cells(cells)

    def report() -> None:
        top = header(cells, argv)
        write_json(
            args.out / "algorithms.json", {"task": args.task} | top | {"rows": records(cells)}
        )
        shown = table(cells) + remark(top)
        write_text(args.out / "algorithms.md", shown + "\n")
        print(shown)
        print(
            f"\n{cells[0].metric.replace('_', ' ')}; gain: paired by question, 95% interval of a "
            f"bootstrap over questions and seeds. algorithms.json and .md are in {args.out}"
        )

    carry_out(args, argv, runs_of(cells), report)


def main(argv: Sequence[str] | None = None) -> int:
    """`agentr1 algorithms TASK [--recipes grpo ppo] [--jobs N] [--report] [--key value ...]`."""
    parser = grid_parser("algorithms", "Compare what the recipes of a task gain.", str(OUT))
    parser.add_argument(
        "--recipes",
        nargs="+",
        help=f"names of recipes of the task (those it has of {', '.join(RECIPES)})",
    )
    args, overrides = split_arguments(parser, argv)
    return guarded(lambda: algorithms(args, overrides, ["algorithms", *(argv or ())]), args.debug)
