"""What the judge of collapse calls an alarm: each way to collapse, and nothing that learning does.

Series are synthetic, but for one that a run of the quickstart logged; runs that really collapse are
in test_guard.py. How often chance makes an alarm is counted over runs in which nothing changes.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentr1.collapse import (
    COOL_DOWN,
    GROUPS,
    MEMORY,
    RECENT,
    RULES,
    WARM_UP,
    Alarm,
    Judge,
    level,
    noise,
    records_judged,
    records_suspect,
)

LIMIT = 6
Observation = dict[str, float]
# reward, entropy, silent groups, turns, mistakes, calls: recipes/quickstart/grpo.yaml, every step
QUICKSTART = """
.167 .313 .417 2.26 .146 1.281, .073 .205 .583 2.479 .042 1.479, .344 .197 .417 2.708 .083 1.708,
.354 .141 .417 2.896 .052 1.927, .438 .149 .333 2.812 .125 1.823, .385 .138 .417 2.792 .0 1.792,
.427 .15 .25 2.917 .052 1.917, .406 .142 .417 2.792 .052 1.792, .271 .157 .5 3.01 .042 2.01,
.469 .154 .333 2.594 .042 1.615, .302 .168 .5 2.958 .104 1.979, .458 .124 .417 2.521 .01 1.531,
.479 .127 .5 2.594 .062 1.646, .583 .092 .333 2.865 .073 1.906, .698 .074 .25 2.698 .031 1.698,
.562 .094 .5 2.844 .01 1.844, .479 .134 .583 2.948 .052 1.958, .406 .122 .583 2.917 .021 1.927,
.5 .143 .583 2.927 .104 1.958, .396 .129 .667 3.167 .125 2.24, .719 .06 .583 2.844 .0 1.844,
.469 .093 .5 3.083 .01 2.083, .562 .121 .25 2.875 .125 1.917, .427 .082 .167 3.083 .01 2.083,
.5 .161 .5 3.031 .135 2.042, .75 .062 .5 3.021 .021 2.021, .635 .069 .583 3.031 .031 2.031,
.542 .082 .583 3.01 .031 2.01, .688 .075 .417 3.0 .01 2.0, .521 .066 .417 3.094 .031 2.104,
.333 .087 .667 3.083 .031 2.094, .635 .064 .333 3.01 .021 2.021, .646 .067 .417 2.833 .0 1.833,
.323 .112 .333 3.375 .083 2.406, .688 .058 .583 2.75 .0 1.75, .625 .09 .417 2.99 .115 2.031,
.531 .075 .333 3.0 .01 2.0, .448 .095 .583 3.094 .031 2.115, .562 .073 .5 2.854 .042 1.854,
.448 .09 .75 3.104 .052 2.104
"""


def healthy(draw: random.Random, share: float, noise: float = 1.0) -> Observation:
    """A policy that has learned `share` of the task: it earns more, is surer and calls better."""

    def near(value: float, spread: float) -> float:
        return value + noise * draw.gauss(0, spread)

    return {
        "reward": min(1.0, max(0.0, near(0.2 + 0.75 * share, 0.08))),
        "displacement": near(0.01, 0.02),
        "entropy": max(0.0, near(0.8 * 0.03**share, 0.03)),
        "silent groups": min(1.0, max(0.0, near(0.3 + 0.65 * share, 0.1))),
        "turns": min(LIMIT, max(1.0, near(2.0 + share, 0.1))),
        "invalid calls": min(1.0, max(0.0, near(0.3 - 0.28 * share, 0.05))),
    }


def alarms(judge: Judge, series: Iterable[Observation]) -> list[tuple[int, Alarm]]:
    """Position and alarm of all that the series sets off, on a task that pays 0 or 1."""
    judge.scale([0.0, 1.0])
    found = []
    for i, seen in enumerate(series):
        rest = {name: value for name, value in seen.items() if name != "reward"}
        if alarm := judge.observe(seen["reward"], rest):
            found.append((i, alarm))
    return found


def learning(seed: int, steps: int, noise: float = 1.0) -> list[Observation]:
    draw = random.Random(seed)
    return [healthy(draw, 1 / (1 + math.exp(4 - 8 * i / steps)), noise) for i in range(steps)]


@given(st.integers(0, 10**6), st.integers(20, 200), st.floats(0.0, 1.0))
def test_learning_sets_off_nothing(seed: int, steps: int, noise: float) -> None:
    assert alarms(Judge(LIMIT), learning(seed, steps, noise)) == []


# Chance sets off an alarm in one of some thousand such runs, so always the same ones are tried.
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.7, 1.0])
def test_noise_around_a_level_sets_off_nothing(share: float, noise: float) -> None:
    for seed in range(10):
        draw = random.Random(seed)
        assert alarms(Judge(LIMIT), [healthy(draw, share, noise) for _ in range(150)]) == []


def test_what_a_run_of_the_quickstart_logged_sets_off_nothing() -> None:
    names = ("reward", "entropy", "silent groups", "turns")
    series = []
    for line in QUICKSTART.split(","):
        *seen, mistakes, calls = map(float, line.split())
        shares = {"invalid calls": mistakes / calls}
        series.append(dict(zip(names, seen, strict=True)) | shares)
    assert len(series) == 40
    assert alarms(Judge(5), series) == []


def test_a_policy_that_was_good_from_the_start_may_become_certain() -> None:
    draw = random.Random(0)
    series = [
        healthy(draw, 1.0) | {"entropy": 0.3 * 0.9**i, "silent groups": min(1.0, 0.5 + i / 60)}
        for i in range(80)
    ]
    assert alarms(Judge(LIMIT), series) == []


# Share of rows of the second kind, and how often an episode of either kind is won.
TASKS = {
    "half easy, half hard": (0.5, 0.95, 0.05),
    "all hard": (0.0, 0.05, 0.05),
    "all very hard": (0.0, 0.02, 0.02),
    "most impossible": (0.8, 0.9, 0.0),
}
SIZES = (1, 2, 4, 8, 12)
"""Groups a record, of eight rollouts each."""


def drawn(task: str, groups: int, draw: random.Random) -> Observation:
    """A record of episodes that pay 0 or 1, of a policy that always plays the same."""
    share, *chances = TASKS[task]
    won = []
    for _ in range(groups):
        chance = chances[draw.random() < share]
        won.append(sum(draw.random() < chance for _ in range(8)))
    return {
        "reward": sum(won) / 8 / groups,
        "silent groups": sum(count in (0, 8) for count in won) / groups,
    }


def false_alarms(task: str, groups: int, runs: int) -> int:
    """Runs of 300 records in which nothing changes, and an alarm is given all the same."""

    def run(seed: int) -> bool:
        draw = random.Random(f"{task} {groups} {seed}")
        series = [drawn(task, groups, draw) for _ in range(300)]
        return bool(alarms(Judge(LIMIT, records_judged(groups)), series))

    return sum(run(seed) for seed in range(runs))


@pytest.mark.parametrize("task", sorted(TASKS))
def test_where_nothing_changes_chance_sets_off_at_most_two_in_a_hundred(task: str) -> None:
    runs = 10
    assert sum(false_alarms(task, groups, runs) for groups in SIZES) <= 0.02 * len(SIZES) * runs


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("task", sorted(TASKS))
def test_so_it_is_for_every_number_of_groups(task: str) -> None:
    found = {groups: false_alarms(task, groups, 200) for groups in SIZES}
    print(task, found)
    assert max(found.values()) <= 4


@pytest.mark.parametrize("groups", SIZES)
def test_a_total_loss_is_seen_through_the_noise_of_few_groups(groups: int) -> None:
    draw, judged = random.Random(groups), records_judged(groups)
    series = [drawn("half easy, half hard", groups, draw) for _ in range(4 * judged)]
    series += [{"reward": 0.0, "silent groups": 1.0}] * 2 * judged
    (first, alarm), *_ = alarms(Judge(LIMIT, judged), series)
    assert alarm.signal == "silent groups"
    assert 4 * judged <= first < 6 * judged


@pytest.mark.parametrize(("groups", "judged"), [(0.5, 72), (1, 36), (5, 8), (12, 3), (400, 3)])
def test_as_many_records_are_judged_as_hold_enough_groups(groups: float, judged: int) -> None:
    assert records_judged(groups) == judged
    assert judged == RECENT or judged * groups >= GROUPS > (judged - 1) * groups
    assert records_suspect(judged) >= judged + RECENT


def test_rows_that_need_other_numbers_of_turns_are_no_collapse() -> None:
    draw = random.Random(0)
    series = []
    for _ in range(300):  # one group a record: of an easy row, or of a hard one
        hard = draw.random() < 0.5
        series.append(
            {"reward": 0.1 if hard else 0.9, "turns": 6.0 if hard else 1.0}
            | {"entropy": 0.6 if hard else 0.04, "invalid calls": 0.6 if hard else 0.0}
        )
    assert alarms(Judge(LIMIT, records_judged(1)), series) == []


# What happens to a policy that has learned half of the task, i observations after the fall began.
COLLAPSES: dict[str, tuple[str, Callable[[int], Observation]]] = {
    "likelihood drains away": ("displacement", lambda i: {"displacement": -0.2 - 0.1 * i}),
    "says the same": ("entropy", lambda i: {"entropy": 0.001, "reward": 0.2}),
    "noise": ("entropy", lambda i: {"entropy": 2.0 + i, "reward": 0.05}),
    "silence": ("silent groups", lambda i: {"silent groups": 0.95, "reward": 0.1}),
    "one turn": ("turns", lambda i: {"turns": 1.0, "reward": 0.2}),
    "no answer": ("turns", lambda i: {"turns": 6.0, "reward": 0.1}),
    "malformed": ("invalid calls", lambda i: {"invalid calls": 0.9, "reward": 0.1}),
    "paid to be malformed": ("invalid calls", lambda i: {"invalid calls": 0.9, "reward": 1.0}),
}


def collapsing(name: str, seed: int = 0, before: int = 30, after: int = 10) -> list[Observation]:
    draw = random.Random(seed)
    well = [healthy(draw, 0.5) for _ in range(before)]
    return well + [healthy(draw, 0.5) | COLLAPSES[name][1](i) for i in range(after)]


@pytest.mark.parametrize("name", sorted(COLLAPSES))
@pytest.mark.parametrize("seed", range(5))
def test_each_way_to_collapse_is_seen_after_so_many_observations(name: str, seed: int) -> None:
    signal = COLLAPSES[name][0]
    (first, alarm), *_ = alarms(Judge(LIMIT), collapsing(name, seed))
    assert first == 30 + RECENT - 1
    assert alarm.signal == signal
    for part in (signal, f"{alarm.value:.3g}", f"{alarm.past:.3g}", alarm.meaning):
        assert part in str(alarm)


@pytest.mark.parametrize("name", sorted(COLLAPSES))
def test_a_fall_that_ends_in_time_sets_off_nothing(name: str) -> None:
    draw = random.Random(1)
    series = collapsing(name, after=RECENT - 1) + [healthy(draw, 0.5) for _ in range(10)]
    assert alarms(Judge(LIMIT), series) == []


@pytest.mark.parametrize("name", ["says the same", "silence", "one turn", "no answer", "noise"])
def test_the_same_is_no_collapse_while_the_reward_rises(name: str) -> None:
    series = [*collapsing(name, after=0), *collapsing(name)[30:]]
    for seen in series[30:]:
        seen["reward"] = 0.97
    assert alarms(Judge(LIMIT), series) == []


def test_a_solved_task_that_is_lost_is_seen_though_its_groups_were_silent_before() -> None:
    draw = random.Random(0)
    lost = {"reward": 0.4, "silent groups": 1.0, "entropy": 0.03}
    series = [healthy(draw, 0.5) for _ in range(10)]
    series += [healthy(draw, 1.0) for _ in range(40)]
    series += [healthy(draw, 1.0) | lost for _ in range(RECENT)]
    (first, alarm), *_ = alarms(Judge(LIMIT), series)
    assert (first, alarm.signal) == (49 + RECENT, "silent groups")


def test_silence_says_nothing_where_groups_never_differed() -> None:
    series = [seen | {"silent groups": 1.0} for seen in collapsing("silence")]
    assert alarms(Judge(LIMIT), series) == []


def test_one_turn_is_no_collapse_where_there_is_but_one() -> None:
    series = [seen | {"turns": 1.0} for seen in collapsing("one turn")]
    assert alarms(Judge(1), series) == []


@pytest.mark.parametrize("name", sorted(COLLAPSES))
def test_nothing_is_judged_before_there_is_a_past(name: str) -> None:
    assert alarms(Judge(LIMIT), collapsing(name, before=WARM_UP - 1, after=RECENT)) == []


def test_after_an_alarm_it_waits_and_does_not_take_the_fall_for_the_past() -> None:
    found = alarms(Judge(LIMIT), collapsing("malformed", after=100))
    assert [i for i, _ in found][:3] == [32 + n * (COOL_DOWN + RECENT) for n in range(3)]
    assert {round(alarm.past, 9) for _, alarm in found} == {round(found[0][1].past, 9)}
    assert len(found) == 8


def test_after_a_return_it_does_not_wait() -> None:
    judge = Judge(LIMIT)
    assert alarms(judge, collapsing("malformed", after=RECENT))
    judge.resume()
    ((first, _),) = alarms(judge, collapsing("malformed", after=RECENT)[30:])
    assert first == RECENT - 1


@given(st.sampled_from(sorted(COLLAPSES)), st.integers(0, 60), st.integers(0, 100))
def test_a_judge_goes_on_from_its_state(name: str, cut: int, seed: int) -> None:
    series = collapsing(name, seed, after=30)
    whole, first, second = Judge(LIMIT), Judge(LIMIT), Judge(LIMIT)
    expected = alarms(whole, series)
    found = alarms(first, series[:cut])
    second.load(json.loads(json.dumps(first.state())))
    found += [(i + len(series[:cut]), alarm) for i, alarm in alarms(second, series[cut:])]
    assert found == expected
    assert second.state() == whole.state()


def test_missing_and_broken_numbers_are_passed_over() -> None:
    judge = Judge(LIMIT)
    judge.scale([0.0, 1.0, math.nan])
    for i in range(60):
        broken: dict[str, Any] = {"entropy": math.nan, "turns": 2.0} if i % 2 else {}
        assert judge.observe(0.5, broken) is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("start", [0, 20])
def test_a_reward_that_is_no_number_is_passed_over(broken: float, start: int) -> None:
    judge, series = Judge(LIMIT), collapsing("silence")
    series[start:start] = [series[0] | {"reward": broken}] * (WARM_UP + 2 * RECENT)
    (first, alarm), *_ = alarms(judge, series)
    assert (first, alarm.signal) == (32 + WARM_UP + 2 * RECENT, "silent groups")
    assert all(math.isfinite(seen["reward"]) for seen in judge.state()["records"])
    assert json.loads(json.dumps(judge.state(), allow_nan=False))


def test_a_run_without_a_single_reward_sets_off_nothing() -> None:
    series = [seen | {"reward": math.nan} for seen in collapsing("malformed")]
    assert alarms(Judge(LIMIT), series) == []


def test_updates_that_went_astray_hide_no_collapse() -> None:
    series = collapsing("likelihood drains away")
    for i in (20, 21):
        series[i]["displacement"] = -3.0
    ((first, alarm),) = alarms(Judge(LIMIT), series)[:1]
    assert (first, alarm.signal) == (30 + RECENT - 1, "displacement")


def test_it_remembers_only_so_much() -> None:
    judge = Judge(LIMIT, 5)
    alarms(judge, learning(0, 300))
    assert len(judge.state()["records"]) == MEMORY + 5


def test_a_level_leaves_the_extremes_out() -> None:
    assert level([1.0] * 9 + [100.0]) == 1.0
    assert level([0.0, *range(1, 10), 100.0]) == 5.0


def test_noise_leaves_spikes_out_on_demand() -> None:
    values = [0.0, 0.1] * 20
    values[10] = 50.0
    assert noise(values, 0.1) == pytest.approx(noise([0.0, 0.1] * 20))
    assert noise(values) > 5


def test_noise_is_what_changes_from_one_to_the_next_and_a_trend_is_none() -> None:
    draw = random.Random(0)
    flat = [draw.gauss(5, 0.2) for _ in range(400)]
    assert noise(flat) == pytest.approx(0.2, rel=0.2)
    rising = [x + i / 100 for i, x in enumerate(flat)]
    assert noise(rising) == pytest.approx(noise(flat), rel=0.2)


def test_every_rule_is_tried_here() -> None:
    assert {signal for signal, _ in COLLAPSES.values()} == set(RULES)
