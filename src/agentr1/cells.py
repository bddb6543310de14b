"""The runs of a grid as data: what each is, how far it is, what runs of several seeds amount to.

Layer 7: reads run folders and starts nothing. `grid` does the runs; `ablate` and `algorithm_table`
say which there are and lay their cells out as a table.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import fcntl
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from agentr1.runs import read_scores
from agentr1.statistics import Interval, mean_over_runs, paired_difference_over_runs

if TYPE_CHECKING:  # what runs a grid needs no torch
    from agentr1.recipe import Recipe


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One training run, by `agentr1 train`, in a folder of its own.

    Attributes:
        name: what it is called on the screen.
        folder: its run folder.
        recipe: as `agentr1 train` takes it.
        text: the recipe's YAML; what another text made is not this run.
        overrides: options of `agentr1 train`.
        steps: optimizer steps, 0 where the recipe does not say.
    """

    name: str
    folder: Path
    recipe: str
    text: str
    overrides: tuple[str, ...] = ()
    steps: int = 0

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows `agentr1` on the command line."""
        return ("train", self.recipe, *self.overrides, "--output_dir", str(self.folder))

    @property
    def command(self) -> str:
        """What its folder's `command.txt` says."""
        return shlex.join(["agentr1", *self.arguments])

    @property
    def log(self) -> Path:
        """What its processes print; one of them holds a lock on it as long as it lives."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def step(self) -> int:
        """The last step that was logged."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return int(json.loads(lines[-1])["step"])
        except (OSError, IndexError, json.JSONDecodeError):  # none yet, or one is being written
            return 0


class State(enum.StrEnum):
    """How far a run is. `BEGUN`: it was stopped, failed or killed, and no process works on it."""

    NEW = "not started"
    BEGUN = "begun"
    RUNNING = "running"
    DONE = "done"
    FOREIGN = "another command's or recipe's"


def state_of(run: Run, held: bool = False) -> State:
    """Look at a run's folder, and at the lock on its log.

    Args:
        run: whose.
        held: the caller has the lock, so that it says nothing.
    """
    locked = not held and _is_locked(run.log)
    ours = _is_ours(run)
    if ours is False or (ours is None and not locked and any(run.folder.glob("*"))):
        return State.FOREIGN
    if locked:
        return State.RUNNING
    if ours is None:
        return State.NEW
    return State.DONE if "after" in evaluation(run) else State.BEGUN


def evaluation(run: Run) -> dict[str, Any]:
    """The run's `eval.json`, empty before there is one."""
    try:
        return json.loads((run.folder / "eval.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _is_locked(log: Path) -> bool:
    if not log.exists():
        return False
    with log.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _is_ours(run: Run) -> bool | None:
    """The folder holds this run: the command was the same, and the recipe but for its comments.

    None where it does not say what it holds.
    """
    try:
        command = (run.folder / "command.txt").read_text(encoding="utf-8").strip()
        keys = yaml.safe_load((run.folder / "recipe.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except yaml.YAMLError:
        return False
    return command == run.command and keys == yaml.safe_load(run.text)


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """Runs that differ by their seed alone.

    Attributes:
        runs: by seed.
        metric: what is compared.
        keys: what tells this cell from others, for the record.
    """

    runs: Mapping[int, Run]
    metric: str
    keys: Mapping[str, Any]

    def scores(self, moment: str = "after") -> dict[int, dict[str, float]]:
        """Value by row id, for each seed whose run is done.

        Args:
            moment: `before` or `after` the training.
        """
        return {
            seed: read_scores(run.folder / "evaluation" / f"{moment}.jsonl", self.metric)
            for seed, run in self.runs.items()
            if state_of(run) is State.DONE
        }

    def mean(self, moment: str = "after") -> Interval | None:
        """Over the seeds that are done; None where none is."""
        scores = self.scores(moment)
        return mean_over_runs(list(scores.values())) if scores else None

    def difference(self, other: Cell) -> Interval | None:
        """This cell minus another, on the seeds that both have done."""
        return _paired(self.scores(), other.scores())

    def gain(self) -> Interval | None:
        """After the training minus before."""
        return _paired(self.scores("after"), self.scores("before"))

    def seconds(self) -> float | None:
        """Mean of whole runs; of a run that was resumed only the last part is known."""
        known = [
            evaluation(run)["seconds"]
            for run in self.runs.values()
            if state_of(run) is State.DONE
            and " --resume\n" not in run.log.read_text(errors="replace")
        ]
        return sum(known) / len(known) if known else None

    def record(self) -> dict[str, Any]:
        """What a JSON file keeps of it."""
        scores, mean = self.scores(), self.mean()
        return {
            **self.keys,
            "seeds": sorted(scores),
            "values": {seed: sum(v.values()) / len(v) for seed, v in sorted(scores.items())},
            **interval_record("mean", mean),
            "n": mean.n if mean else 0,
            "runs": {seed: str(run.folder) for seed, run in self.runs.items()},
        }


def plan_cell(
    recipe: Recipe,
    overrides: Sequence[str],
    seeds: Sequence[int],
    *,
    out: Path,
    place: str,
    metric: str,
    keys: Mapping[str, Any],
) -> Cell:
    """Name the runs of a recipe, one per seed, and see that it can be trained.

    Args:
        recipe: loaded with the overrides.
        overrides: options of `agentr1 train`.
        seeds: of the runs.
        out: folder of the grid.
        place: the cell's folder in it.
        metric: see `Cell`, as `keys`.
        keys: what tells it from others.

    Raises:
        ValueError: settings that `agentr1 train` would refuse.
    """
    recipe.training.check_for_environment()
    runs = {
        seed: Run(
            name=f"{place}/seed{seed}",
            folder=out / place / f"seed{seed}",
            recipe=recipe.name,
            text=recipe.text,
            overrides=(*overrides, "--seed", str(seed)),
            steps=max(0, recipe.training.max_steps),
        )
        for seed in seeds
    }
    return Cell(runs, metric, keys)


def check_cells(cells: Iterable[Cell]) -> None:
    """See that what the recipes name is there, equal recipes once: no weights, nothing started.

    Raises:
        ValueError, FileNotFoundError: a mistake that `agentr1 train` would find in each run.
    """
    from agentr1.recipe import load_recipe  # here, since what runs a grid needs no torch
    from agentr1.train import resolve

    seen = set()
    for run in (next(iter(cell.runs.values())) for cell in cells):
        recipe = load_recipe(run.recipe, run.overrides)
        named = (recipe.arguments, recipe.model.model_name_or_path, recipe.training.limits)
        if repr(named) not in seen:
            resolve(recipe)
            seen.add(repr(named))


def _paired(
    a: Mapping[int, Mapping[str, float]], b: Mapping[int, Mapping[str, float]]
) -> Interval | None:
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    return paired_difference_over_runs([a[s] for s in seeds], [b[s] for s in seeds])


# Files and tables ------------------------------------------------------------------------------


def interval_record(name: str, interval: Interval | None) -> dict[str, Any]:
    """`{name: value, name_ci95: [low, high]}`."""
    ends = None if interval is None else [interval.low, interval.high]
    return {name: None if interval is None else interval.mean, f"{name}_ci95": ends}


def header(cells: Sequence[Cell], command: Sequence[str]) -> dict[str, Any]:
    """What a result file opens with: date, verb and its options, what the runs ran on and with."""
    environments: list[Any] = []
    done = [run for run in runs_of(cells) if state_of(run) is State.DONE]
    for run in done:
        found = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
        if found not in environments:
            environments.append(found)
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["agentr1", *command]),
        "metric": cells[0].metric,
        "split": evaluation(done[0]).get("split") if done else None,
        "environments": environments,
    }


def remark(top: Mapping[str, Any]) -> str:
    """What has to stand under a table: nothing, or that its rows are not those of test."""
    if top["split"] != "dev":
        return ""
    return "\n\nTested on the rows of dev: the data set has no others."


def runs_of(cells: Iterable[Cell]) -> list[Run]:
    """The runs of all cells, seed by seed: what is done first has something in every cell."""
    pairs = [(seed, run) for cell in cells for seed, run in cell.runs.items()]
    return [run for _, run in sorted(pairs, key=lambda pair: pair[0])]


def progress_line(runs: Sequence[Run]) -> str:
    """How many runs are in which state, and how far those are that run now."""
    states = {run.name: state_of(run) for run in runs}
    counts = Counter(states.values())
    said = [f"{counts[state]} {state}" for state in State if counts[state]]
    at = [
        f"{run.name} (step {run.step} of {run.steps or '?'})"
        for run in runs
        if states[run.name] is State.RUNNING
    ]
    return f"{len(runs)} runs: {', '.join(said)}" + (f"; now {', '.join(at)}" if at else "")


def number(value: float | None, sign: str = "") -> str:
    """`.350`, `+.323`, or `-` where there is none."""
    return "-" if value is None else re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{sign}.3f}")


def with_interval(interval: Interval | None, sign: str = "") -> str:
    """`.350 [.297, .403]`, or `-`."""
    if interval is None:
        return "-"
    mean, low, high = (number(x, sign) for x in interval[:3])
    return f"{mean} [{low}, {high}]"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that is read as well in a terminal as on a page."""
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )
