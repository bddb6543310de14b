"""Two processes whose episodes differ in length stay in step, under DDP, ZeRO-2 and ZeRO-3.

Each configuration is launched once; its ranks check every row on its way (`ranks_worker.py`), the
tests here look at what they report. Nothing may take longer than two minutes: a launch that hangs
is killed and has failed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from processes import ROOT, job, launcher
from ranks_worker import MOST_TURNS, SCENARIOS, TIMEOUT

CONFIGURATIONS = ("cpu_ddp", "cpu_zero2", "cpu_zero3")
WORKER = str(ROOT / "tests" / "ranks_worker.py")
LIMIT = 100
"""Seconds a launch may take."""

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(120)]


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def ranks(
    request: pytest.FixtureRequest, policy_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What the two ranks of one launch report."""
    out = tmp_path_factory.mktemp(request.param)
    with job(
        [*launcher(request.param), WORKER, str(policy_folder), str(out)], out / "log"
    ) as launch:
        assert launch.wait(LIMIT) == 0, launch.output[-6000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_the_ranks_did_take_different_numbers_of_turns(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["turns"] for rank in ranks)
    assert first["uneven"] == second["swapped"] == [1] * 4
    assert second["uneven"] == first["swapped"] == [MOST_TURNS] * 4
    assert first["faulted"] == [MOST_TURNS] * 4
    assert len(set(first["mixed"] + second["mixed"])) > 2
    assert list(first) == list(second) == list(SCENARIOS)


def test_rewritten_contexts_make_as_many_rows_on_both_ranks(ranks: list[dict[str, Any]]) -> None:
    # Rank 1 trains one row a turn, in two micro-batches; rank 0 is filled up to as many.
    assert ranks[1]["turns"]["rewritten"] == [4] * 4
    assert [rank["rows"]["rewritten"] for rank in ranks] == [16, 16]
    assert all(rank["rows"]["mixed"] == 4 for rank in ranks)


def test_silent_groups_are_refilled_in_as_many_rounds_on_both_ranks(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        ids = rank["ids"]["refilled"]
        assert ids[::2] == ids[1::2]
    logged = ranks[0]["logged"][SCENARIOS.index("refilled")]
    assert logged["rollout/refilled_groups"] > 0


def test_a_hanging_tool_costs_its_timeout_and_no_more(ranks: list[dict[str, Any]]) -> None:
    assert TIMEOUT <= ranks[1]["seconds"]["hanging"] < TIMEOUT + 10


def test_the_weights_are_equal_on_both_ranks_after_every_step(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert rank["apart"] == dict.fromkeys(SCENARIOS, 0.0)


def test_every_step_that_has_something_to_train_on_moves_the_weights(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert all(moved > 0 for name, moved in rank["moved"].items() if name != "all_faulted")


def test_an_evaluation_is_the_same_on_both_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["evaluations"] for rank in ranks)
    assert len(first) == 3
    assert first == second


def test_logged_numbers_are_means_over_the_episodes_of_both_ranks(
    ranks: list[dict[str, Any]],
) -> None:
    logged = ranks[0]["logged"]
    assert len(logged) == len(SCENARIOS)
    for record, name in zip(logged, SCENARIOS, strict=True):
        turns, rewards = ([*ranks[0][k][name], *ranks[1][k][name]] for k in ("turns", "rewards"))
        assert record["rollout/turns"] == pytest.approx(sum(turns) / 8)
        assert record["reward"] == pytest.approx(sum(rewards) / 8)
    # Only rank 1 has ever reported this one: its four episodes are half of all.
    paid = logged[SCENARIOS.index("paid")]["rollout/paid_calls"]
    assert paid == pytest.approx(sum(turns - 1 for turns in ranks[1]["turns"]["paid"]) / 8)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_an_environment_that_raises_on_one_rank_ends_the_launch_with_its_error_on_both(
    configuration: str, policy_folder: Path, tmp_path: Path
) -> None:
    command = [*launcher(configuration), WORKER, str(policy_folder), str(tmp_path), "raising"]
    with job(command, tmp_path / "log") as launch:
        assert launch.wait(LIMIT) != 0
    failed = r"the episode of row 'r\d+' failed: ZeroDivisionError: a bug of the environment"
    assert re.search(f"RuntimeError: {failed}", launch.output), launch.output[-6000:]
    assert re.search(f"RuntimeError: on another process: {failed}", launch.output)


def test_processes_whose_group_outlives_the_training_end_well(tmp_path: Path) -> None:
    worker = str(ROOT / "tests" / "ending_worker.py")
    for attempt in range(3):  # ended at once, about every third launch was aborted
        with job([*launcher("cpu_ddp"), worker], tmp_path / f"log{attempt}") as launch:
            assert launch.wait(LIMIT) == 0, launch.output[-6000:]
