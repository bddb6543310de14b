"""Runs of several seeds as numbers: against a hand computation, and what is missing as a dash."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agentr1.cells import (
    Cell,
    State,
    evaluation,
    header,
    markdown,
    number,
    remark,
    runs_of,
    state_of,
    with_interval,
)
from agentr1.runs import write_json
from agentr1.statistics import Interval
from grids import finish_run, make_run

ROWS = ("q1", "q2", "q3", "q4")


def values(*numbers: float) -> dict[str, float]:
    return dict(zip(ROWS, numbers, strict=True))


def cell(folder: Path, name: str, after: dict[int, dict[str, float]]) -> Cell:
    """Three seeds, of which these are done."""
    runs = {seed: make_run(folder, f"{name}/seed{seed}", "--seed", str(seed)) for seed in (1, 2, 3)}
    for seed, found in after.items():
        finish_run(runs[seed], before=values(0, 0, 1, 0), after=found, seconds=100.0 * seed)
    return Cell(runs, "exact_match", {"name": name})


@pytest.fixture
def full(tmp_path: Path) -> Cell:
    found = {1: values(1, 1, 1, 0), 2: values(1, 0, 1, 0), 3: values(1, 1, 1, 1)}
    return cell(tmp_path, "full", found)


@pytest.fixture
def partial(tmp_path: Path) -> Cell:
    return cell(tmp_path, "partial", {3: values(0, 0, 1, 1), 1: values(0, 0, 1, 0)})


def test_a_cell_is_the_mean_of_its_seeds(full: Cell, partial: Cell) -> None:
    found = full.mean()
    assert found is not None
    assert found.mean == pytest.approx((3 + 2 + 4) / 12)
    assert found.low < found.mean < found.high
    assert found.n == 4
    assert sorted(partial.scores()) == [1, 3]
    before = partial.mean("before")
    assert before is not None
    assert before.mean == pytest.approx(0.25)


def test_a_difference_is_paired_by_seed_and_question(full: Cell, partial: Cell) -> None:
    """Seeds 1 and 3 have (-1, -1, 0, 0) both: only the questions leave anything to chance."""
    found = partial.difference(full)
    assert found is not None
    assert found.mean == pytest.approx(-0.5)
    draws = np.random.default_rng(1).integers(4, size=(100_000, 4))
    means = np.array([-1.0, -1.0, 0.0, 0.0])[draws].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)
    back = full.difference(partial)
    assert back is not None
    assert back.mean == pytest.approx(0.5)
    gain = partial.gain()
    assert gain is not None
    assert gain.mean == pytest.approx((0 + 1) / 2 / 4)


def test_what_no_seed_has_done_is_missing(tmp_path: Path, full: Cell) -> None:
    empty = cell(tmp_path, "empty", {})
    found = (empty.mean(), empty.gain(), empty.difference(full), full.difference(empty))
    assert found == (None, None, None, None)
    assert empty.seconds() is None
    assert empty.record()["mean"] is None
    assert empty.record()["seeds"] == []


def test_a_run_that_is_not_done_does_not_count(full: Cell) -> None:
    (full.runs[3].folder / "eval.json").unlink()
    assert state_of(full.runs[3]) is State.BEGUN
    assert sorted(full.scores()) == [1, 2]


def test_seconds_are_those_of_runs_in_one_piece(full: Cell) -> None:
    assert full.seconds() == pytest.approx(200)
    with full.runs[3].log.open("a") as log:
        log.write("$ agentr1 train --resume\n")
    assert full.seconds() == pytest.approx(150)


def test_a_record_holds_what_the_table_was_made_of(full: Cell, partial: Cell) -> None:
    record = json.loads(json.dumps(full.record()))
    assert record["name"] == "full"
    assert record["seeds"] == [1, 2, 3]
    assert record["values"] == {"1": 0.75, "2": 0.5, "3": 1.0}
    assert record["mean"] == pytest.approx(0.75)
    assert record["mean_ci95"][0] < 0.75 < record["mean_ci95"][1]
    assert record["n"] == 4
    assert record["runs"]["2"] == str(full.runs[2].folder)
    top = header([full, partial], ["ablate", "quickstart"])
    assert top["command"] == "agentr1 ablate quickstart"
    assert top["metric"] == "exact_match"
    assert top["environments"] == [{"cpus": 2, "versions": {"trl": "1.16.0"}}]
    assert top["date"][:2] == "20"
    assert (top["split"], remark(top)) == (None, "")


def test_rows_of_dev_are_called_so_under_the_table(full: Cell) -> None:
    for run in full.runs.values():
        write_json(run.folder / "eval.json", {"split": "dev"} | evaluation(run))
    top = header([full], ["ablate", "quickstart"])
    assert top["split"] == "dev"
    assert "rows of dev" in remark(top)


def test_runs_come_seed_by_seed(full: Cell, partial: Cell) -> None:
    names = [run.name for run in runs_of([full, partial])]
    assert names == [f"{name}/seed{seed}" for seed in (1, 2, 3) for name in ("full", "partial")]


def test_numbers_and_tables_are_written_as_the_readmes_do() -> None:
    assert [number(0.35), number(1.0), number(None)] == [".350", "1.000", "-"]
    assert [number(0.323, "+"), number(-0.0501, "+")] == ["+.323", "-.050"]
    assert [number(10.35), number(20.0), number(-0.5), number(0)] == [
        *("10.350", "20.000", "-.500", ".000"),
    ]
    assert [number(0.25, "+"), number(-10.05, "+")] == ["+.250", "-10.050"]
    assert with_interval(Interval(0.5, 0.4, 0.6, 9)) == ".500 [.400, .600]"
    assert with_interval(None) == "-"
    assert markdown(["", "b"], [["long", "x"], ["", "wide"]]).splitlines() == [
        "|      | b    |",
        "| ---- | ---- |",
        "| long | x    |",
        "|      | wide |",
    ]
