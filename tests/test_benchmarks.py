"""The benchmarks measure what they say: equal work on both sides, honest verdicts.

The times themselves are not tested here: a machine that runs tests is no place to take them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.comparison import Comparison, finish, medians, table


def line(ratio: float, target: float | None, direction: Any = "at least") -> Comparison:
    return Comparison("work", 2.0, 2.0 * ratio, {"rollouts": 16}, target, direction)


@pytest.mark.parametrize(
    ("ratio", "target", "direction", "reached"),
    [
        (6.0, 6.0, "at least", True),
        (5.9, 6.0, "at least", False),
        (0.4, 0.5, "at most", True),
        (0.6, 0.5, "at most", False),
        (0.1, None, "at least", None),
    ],
)
def test_a_target_is_reached_on_its_side(
    ratio: float, target: float | None, direction: Any, reached: bool | None
) -> None:
    assert line(ratio, target, direction).reached is reached


def test_a_missed_target_fails_the_command_and_is_named(capsys: pytest.CaptureFixture) -> None:
    assert finish([line(7, 6), line(1, None)], None) == 0
    assert "MISSED" not in capsys.readouterr().out
    assert finish([line(7, 6), line(5, 6)], None) == 1
    assert capsys.readouterr().out.count("MISSED") == 1


def test_the_result_file_has_one_shape(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    finish([line(7, 6)], str(path))
    assert json.loads(path.read_text()) == [
        {
            "name": "work",
            "ratio": 7.0,
            "target": 6,
            "direction": "at least",
            "reached": True,
            "ours_s": 2.0,
            "theirs_s": 14.0,
            "workload": {"rollouts": 16},
        }
    ]


def test_both_sides_take_turns_and_the_median_counts() -> None:
    order: list[str] = []

    def side(name: str, times: list[float]) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return times.pop()

        return run

    found = medians(side("ours", [1.0, 9.0, 2.0]), side("theirs", [5.0, 4.0, 80.0]), repeats=3)
    assert found == (2.0, 5.0)
    assert order == ["ours", "theirs"] * 3


def test_a_long_name_stays_in_its_line() -> None:
    assert len(table([line(7, 6)]).splitlines()) == 2


@pytest.fixture
def small_work(tmp_path: Path, make_tokenizer: Callable, make_model: Callable) -> list[str]:
    """Command-line options for a random policy and three rows, one of another length."""
    policy, data = tmp_path / "policy", tmp_path / "data"
    make_tokenizer().save_pretrained(policy)
    make_model().save_pretrained(policy)
    data.mkdir()
    questions = ["Who is 1?", "And how many of them were there?", "Who is 2?"]
    rows = [
        {"id": str(i), "question": question, "answers": ["x"]}
        for i, question in enumerate(questions)
    ]
    passages = [{"id": str(i), "title": f"T{i}", "text": "Born in 1801."} for i in range(3)]
    for name, records in (("train", rows), ("corpus", passages)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (data / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return ["--policy", str(policy), "--data", str(data), "--rollouts", "2"]


@pytest.mark.timeout(600)  # it sleeps, and two of TRL's four ways are slow on a CPU
@pytest.mark.parametrize("calls", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_rollouts_do_equal_work_and_are_reported(
    small_work: list[str], tmp_path: Path, calls: int
) -> None:
    """Equality of ids and masks with each of TRL's ways is checked by the benchmark itself."""
    from benchmarks.rollout import main

    result = tmp_path / "result.json"
    options = ["--turns", "2", "--calls", str(calls), "--repeats", "1", "--latency", "0.02"]
    assert main([*small_work, *options, "--json", str(result)]) == 0  # no target at 0.02 s
    (found,) = json.loads(result.read_text())
    assert found["ratio"] == pytest.approx(found["theirs_s"] / found["ours_s"], rel=0.02)
    work = found["workload"]
    assert (work["rollouts"], work["tool_turns"], work["calls_per_turn"]) == (2, 2, calls)
    assert len(work["action_tokens"]) == 3
    assert len(work["observation_tokens"]) == 2
    assert min(work["prompt_tokens"], *work["action_tokens"], *work["observation_tokens"]) > 0


def test_too_few_rows_of_one_length_are_refused(small_work: list[str]) -> None:
    from benchmarks.rollout import main

    with pytest.raises(ValueError, match="no 3 prompts of one length"):
        main([*small_work, "--rollouts", "3"])
