"""`agentr1 ablate`: what the two masks are worth, without and with process rewards.

Trains PPO and GRPO with every setting of their masks, several seeds each, and lays the exact match
out as Table 4 of Agent-R1's paper (arXiv 2511.14460) does. Run again, it does what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agentr1.cells import (
    Cell,
    check_cells,
    header,
    interval_record,
    markdown,
    plan_cell,
    remark,
    runs_of,
    with_interval,
)
from agentr1.commandline import guarded, split_arguments
from agentr1.grid import carry_out, check_options, given_of, grid_parser
from agentr1.recipe import Recipe, load_recipe, metric_name
from agentr1.runs import write_json, write_text

OUT = Path("runs/ablation")


@dataclasses.dataclass(frozen=True, slots=True)
class Masks:
    """One row of the table.

    Attributes:
        algorithm: recipe of the task.
        folder: of the row's runs.
        label: as the paper words it.
        settings: keys of the recipe that make the row.
    """

    algorithm: str
    folder: str
    label: str
    settings: dict[str, str]


ROWS = (
    Masks(
        "ppo", "both", "PPO, both masks", {"loss_mask": "policy", "advantage_alignment": "policy"}
    ),
    Masks(
        "ppo",
        "no_advantage_mask",
        "PPO, advantage mask off",
        {"loss_mask": "policy", "advantage_alignment": "all"},
    ),
    Masks(
        "ppo",
        "no_loss_mask",
        "PPO, loss mask off",
        {"loss_mask": "all", "advantage_alignment": "policy"},
    ),
    Masks("ppo", "none", "PPO, both off", {"loss_mask": "all", "advantage_alignment": "all"}),
    Masks("grpo", "loss_mask", "GRPO, loss mask on", {"loss_mask": "policy"}),
    Masks("grpo", "no_loss_mask", "GRPO, loss mask off", {"loss_mask": "all"}),
)
"""The first row of each algorithm has all its masks, and the others are compared with it."""
SET = ("algorithm", *sorted({key for masks in ROWS for key in masks.settings}))
"""Keys that tell the rows apart."""
COLUMNS = ("outcome", "process")
"""Folders of the two columns: outcome reward alone, and process rewards besides."""


def plan(
    task: str,
    out: Path,
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    process_recipe: str | None = None,
) -> dict[tuple[str, str, str], Cell]:
    """Name every cell and its runs, and see that their recipes load.

    Args:
        task: folder of recipes that holds `ppo` and `grpo`.
        out: folder of the runs.
        seeds: one run each.
        overrides: of keys, in all runs.
        process_recipe: where process rewards are taken from, see `process_options`.

    Returns:
        Cells by algorithm, row's folder and column.

    Raises:
        ValueError, FileNotFoundError: a mistake in a recipe or an override.
    """
    cells = {}
    for masks in ROWS:
        name = f"{task}/{masks.algorithm}"
        options = [word for key, value in masks.settings.items() for word in (f"--{key}", value)]
        recipe = load_recipe(name, [*overrides, *options])
        paid = process_options(recipe, process_recipe or f"{task}/process", overrides)
        for column, payment in zip(COLUMNS, paid, strict=True):
            key = (masks.algorithm, masks.folder, column)
            given = [*overrides, *options, *payment]
            cells[key] = plan_cell(
                load_recipe(name, given),
                given,
                seeds,
                out=out,
                place="/".join(key),
                metric=metric_name(recipe.arguments.metrics[0]),
                keys={
                    "algorithm": masks.algorithm,
                    "label": masks.label,
                    **masks.settings,
                    "process_rewards": column == "process",
                },
            )
    return cells


def process_options(
    recipe: Recipe, donor: str, overrides: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Options of `agentr1 train` that take process rewards from a recipe, and that give it some.

    A recipe that pays turns itself is used as it is, and with all weights 0 without; any other is
    used as it is without, and with those of the donor.

    Args:
        recipe: with its overrides.
        donor: recipe whose process rewards are taken.
        overrides: the same, since the donor's own settings may not suit this machine.

    Raises:
        ValueError, FileNotFoundError: the donor pays no turn, or is not there.
    """
    own = recipe.arguments.process_rewards
    if own:
        return ["--process_reward_weights", *("0" for _ in own)], []
    given = load_recipe(donor, overrides).arguments
    if not given.process_rewards:
        raise ValueError(
            f"neither {recipe.name} nor {donor} has process_rewards; name a recipe that has with "
            "--process-recipe"
        )
    weights = given.process_reward_weights or [1.0] * len(given.process_rewards)
    options = ["--process_rewards", *given.process_rewards]
    return [], [*options, "--process_reward_weights", *map(str, weights)]


# What the runs amount to -----------------------------------------------------------------------


def table(cells: dict[tuple[str, str, str], Cell]) -> str:
    """Table 4's rows; what no run has given yet is `-`."""
    metric = next(iter(cells.values())).metric.replace("_", " ")
    columns = ["", metric, "to all masks", "with process rewards", "to all masks", "seeds"]
    lines = []
    for masks in ROWS:
        line, done = [masks.label], []
        for column in COLUMNS:
            cell = cells[masks.algorithm, masks.folder, column]
            full = _full(cells, cell, column)
            line += [
                with_interval(cell.mean()),
                "" if cell is full else with_interval(cell.difference(full), "+"),
            ]
            done.append(str(len(cell.scores())))
        lines.append([*line, " + ".join(done)])
    return markdown(columns, lines)


def _full(cells: dict[tuple[str, str, str], Cell], cell: Cell, column: str) -> Cell:
    """The cell with all masks that a cell is compared with."""
    algorithm = cell.keys["algorithm"]
    first = next(masks for masks in ROWS if masks.algorithm == algorithm)
    return cells[algorithm, first.folder, column]


def records(cells: dict[tuple[str, str, str], Cell]) -> list[dict[str, Any]]:
    """Every cell for `ablation.json`."""
    return [
        cell.record() | interval_record("difference", cell.difference(_full(cells, cell, column)))
        for (_, _, column), cell in cells.items()
    ]


def plot(cells: dict[tuple[str, str, str], Cell], path: Path) -> None:
    """The table as a picture, `path.png` and `path.svg`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    looks = {
        "outcome": ("outcome reward", "o", -0.12),
        "process": ("and process rewards", "s", 0.12),
    }
    for column, (label, marker, shift) in looks.items():
        found = [
            (y + shift, interval)
            for y, masks in enumerate(ROWS)
            if (interval := cells[masks.algorithm, masks.folder, column].mean()) is not None
        ]
        axes.errorbar(
            [i.mean for _, i in found],
            [y for y, _ in found],
            xerr=[[i.mean - i.low for _, i in found], [i.high - i.mean for _, i in found]],
            fmt=marker,
            capsize=3,
            label=label,
        )
    axes.set_yticks(range(len(ROWS)), [masks.label for masks in ROWS])
    axes.invert_yaxis()
    metric = next(iter(cells.values())).metric.replace("_", " ")
    axes.set_xlabel(f"{metric}, mean of the seeds and 95% interval")
    figure.legend(loc="outside upper center", ncols=len(looks))
    for suffix in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{suffix}"), dpi=150)


def check_matplotlib() -> None:
    """Say before hours of training that the plot at their end cannot be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(
            "the plot needs matplotlib, which is not installed; pip install 'agentr1[plot]', or "
            "give --no-plot"
        )


def ablate(args: argparse.Namespace, overrides: Sequence[str], argv: Sequence[str]) -> None:
    """Do the runs of the ablation, or report on them; see `grid.carry_out` for what it raises."""
    check_options(args, overrides)
    if given := given_of(SET, overrides):
        raise ValueError(f"the rows of the table differ by {', '.join(SET)}; leave {given} out")
    if not args.no_plot:
        check_matplotlib()
    args.out = args.out or OUT / args.task
    cells = plan(args.task, args.out, args.seeds, overrides, args.process_recipe)
    if not args.report:
        check_cells(cells.values())

    def report() -> None:
        top = header(list(cells.values()), argv)
        write_json(args.out / "ablation.json", {"task": args.task} | top | {"rows": records(cells)})
        shown = table(cells) + remark(top)
        write_text(args.out / "ablation.md", shown + "\n")
        print(shown)
        print(
            f"\nSeeds {args.seeds}; 95% intervals of a bootstrap over questions and seeds, the "
            "differences paired by both."
        )
        if not args.no_plot:
            plot(cells, args.out / "ablation")
        print(f"ablation.json, .md{'' if args.no_plot else ', .png, .svg'} are in {args.out}")

    carry_out(args, argv, runs_of(cells.values()), report)


def main(argv: Sequence[str] | None = None) -> int:
    """`agentr1 ablate TASK [--seeds 1 2 3] [--jobs N] [--report] [--key value ...]`."""
    parser = grid_parser("ablate", "Train with and without masks and process rewards.", str(OUT))
    parser.add_argument(
        "--process-recipe",
        help="whose process rewards are paid (TASK/process) to recipes with none",
    )
    parser.add_argument("--no-plot", action="store_true", help="draw nothing")
    args, overrides = split_arguments(parser, argv)
    return guarded(lambda: ablate(args, overrides, ["ablate", *(argv or ())]), args.debug)
