"""Two evaluations side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentr1.compare import compare, main
from agentr1.runs import write_scores
from agentr1.scoring import Scored
from agentr1.types import Message, StopReason, Trajectory, Turn


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[Path, Path]:
    """The second is better by exactly 0.25 on every row."""
    for name, better in (("one", 0.0), ("two", 0.25)):
        write(tmp_path / name, {f"r{i}": i / 20 + better for i in range(10)})
    return tmp_path / "one", tmp_path / "two"


def write(run: Path, values: dict[str, float]) -> None:
    turn = Turn((2,), (-1.0,), Message("assistant", "x"), prompt_ids=(1,))
    episode = Trajectory({}, (Message("user", "?"),), (turn,), StopReason.ENVIRONMENT)
    scored = [Scored(row_id, {"exact_match": v}, episode) for row_id, v in values.items()]
    write_scores(run / "evaluation" / "after.jsonl", scored)


def sides(*runs: Path) -> list[tuple[str, Path]]:
    return [(run.name, run / "evaluation" / "after.jsonl") for run in runs]


def test_evaluations_of_the_same_rows_are_paired(
    two_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sides(*two_runs)
    difference = compare(first, second, "exact_match", title="held-out rows")
    assert difference.mean == pytest.approx(0.25)
    # Row by row the gain is the same: paired, nothing is left to chance.
    assert difference.low == pytest.approx(0.25)
    assert difference.high == pytest.approx(0.25)
    shown = capsys.readouterr().out
    for part in ("held-out rows", "one", "two", "0.225", "0.475", "paired", "+0.250"):
        assert part in shown


def test_the_caption_says_whether_the_intervals_overlap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "low", {f"r{i}": 0.0 for i in range(9)})
    write(tmp_path / "high", {f"r{i}": 1.0 for i in range(9)})
    low, high = sides(tmp_path / "low", tmp_path / "high")
    compare(low, high, "exact_match")
    assert "do not overlap" in " ".join(capsys.readouterr().out.split())
    compare(low, low, "exact_match")
    assert "intervals overlap" in " ".join(capsys.readouterr().out.split())


def test_evaluations_of_other_rows_are_not_paired(
    two_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write(two_runs[1], {f"other{i}": i / 20 for i in range(12)})
    first, second = sides(*two_runs)
    difference = compare(first, second, "exact_match")
    assert "unpaired" in capsys.readouterr().out
    assert difference.low < difference.mean < difference.high


def test_the_command_compares_two_run_folders(
    two_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run) for run in two_runs]) == 0
    assert "+0.250" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metric", "f2"], r"no metric 'f2', it has ['exact_match']"),
        (["--evaluation", "before"], "does not exist; is"),
    ],
)
def test_the_commands_mistakes_are_one_line(
    two_runs: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    assert main([*(str(run) for run in two_runs), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert "Traceback" not in error
