"""Whether training collapses, told from the numbers a run logs. Numbers in, a verdict out.

Layer 1: no tensors, no files, no trainer; `guard.py` feeds it and acts on what it finds. One
observation is one logged record of training. Every signal is judged against its own past in this
run, because no level of it is healthy everywhere. Two conditions make an alarm:

- the rule of the signal, below, holds for each of the last `RECENT` records: what a single bad
  batch does is noise;
- it holds for the mean of as many records as hold `GROUPS` groups, too, and that is off the past's
  level by more than `MARGIN` standard errors. All numbers depend on which rows were drawn: with one
  group a record, three records say nothing. (Displacement is measured on as many rows of every
  batch: three will do.) The standard deviation is told from the changes between one record and the
  next, so a trend does not widen it.

Ordinary learning moves the same numbers: a policy that gets good has little entropy and mostly
groups without variance. So what success explains is no alarm. A policy is `earning` when its reward
is above where the run began, or in the upper fifth of what episodes were ever paid, and has not
been lost: fallen from the best mean it had by a quarter of what that was above the least, and by
`MARGIN` standard errors. The best of many means is above what it is a mean of; the margin is wide
enough for that. The rules, each with its reason:

- displacement: below zero and its past by 0.1 nats per token, whatever the reward. An update makes
  what it rewards likelier; where that fails again and again, likelihood drains away before the
  reward shows it (arXiv 2512.04220).
- entropy, falling: below a quarter of its past and not earning. A policy that always says the same
  explores nothing; one that is paid for what it says has learned.
- entropy, rising: above twice its past and by 0.5 nats, with the reward lost. The policy dissolves
  into noise; as long as it holds its reward, it explores.
- silent groups: 80% of the groups are without variance, and the reward is lost, or they are a fifth
  of all groups more than before and the policy is not earning. At a low reward no gradient is left;
  at a high one the task is solved.
- turns: all episodes end after one turn, 0.3 fewer than before, or at the limit, a tenth of it more
  than before, and not earning. The policy stopped using its tools, or stopped answering.
- invalid calls: half of the calls are mistakes, a quarter of all calls more than before, whatever
  the reward. No ordinary learning makes calls worse, and a reward that pays for it is exploited.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, sqrt
from statistics import fmean
from typing import Any, NamedTuple

RECENT = 3
"""Departures in a row that make an alarm."""
GROUPS = 36
"""Groups of rollouts whose means are judged."""
WARM_UP = 10
"""Observations of a signal before it is judged."""
MEMORY = 100
"""Observations that make up the past."""
MARGIN = 5.5
"""Standard errors off the past: further than chance goes in a run of some hundred records."""
SPIKES = 0.1
"""Share of a signal's extremes that say nothing of its level and noise: single updates go astray.
Rewards have none: where successes are rare, they are all that rewards consist of."""
COOL_DOWN = 10
"""Observations after an alarm that are neither judged nor remembered, while the answer works."""


def records_judged(groups: float) -> int:
    """Records whose means are judged, of so many groups each."""
    return max(RECENT, ceil(GROUPS / groups))


def records_suspect(judged: int) -> int:
    """Records before an alarm in which the run may have been collapsing already."""
    return max(WARM_UP, 2 * judged)


@dataclass(frozen=True)
class Alarm:
    """A signal that left its past.

    Attributes:
        signal: its name in `RULES`.
        value: the latest.
        past: level of the healthy phase.
        meaning: what the two say, in words.
    """

    signal: str
    value: float
    past: float
    meaning: str

    def __str__(self) -> str:
        return f"{self.signal} is {self.value:.3g}, before {self.past:.3g}: {self.meaning}"


class Past(NamedTuple):
    """A signal while the run was well.

    Attributes:
        level: mean without the extremes.
        least: value.
        margin: how far chance goes from the level.
    """

    level: float
    least: float
    margin: float


class Standing(NamedTuple):
    """How the policy is paid.

    Attributes:
        earning: for what it has learned, or well enough.
        lost: less than it once was.
    """

    earning: bool
    lost: bool


def level(values: Sequence[float]) -> float:
    """Mean of observations without the highest and the lowest tenth of them."""
    cut = int(SPIKES * len(values))
    return fmean(sorted(values)[cut : len(values) - cut])


def noise(values: Sequence[float], spikes: float = 0.0) -> float:
    """Standard deviation of at least two observations in order, whatever their trend.

    Args:
        values: observations.
        spikes: share of the changes, the largest, that count no more than the largest of the rest.
    """
    changes = sorted(abs(b - a) for a, b in zip(values, values[1:], strict=False))
    most = changes[ceil((1 - spikes) * len(changes)) - 1]
    return sqrt(fmean([min(change, most) ** 2 for change in changes]) / 2)


def errors(*counts: int) -> float:
    """`MARGIN` standard errors of the difference of two means, in standard deviations."""
    return MARGIN * sqrt(sum(1 / count for count in counts))


def displaced(value: float, past: Past, standing: Standing, limit: int) -> str | None:
    """What is rewarded becomes less likely."""
    if value < min(0.0, past.level) - max(0.1, past.margin):
        return "updates make what they reward less likely"
    return None


def dissolved(value: float, past: Past, standing: Standing, limit: int) -> str | None:
    """Entropy falls without gain, or rises at a loss."""
    fallen = value < past.level / 4 and value < past.level - past.margin
    if fallen and not standing.earning:
        return "the policy says the same again and again and is not paid for it"
    if value > past.level + max(past.level, 0.5, past.margin) and standing.lost:
        return "the policy dissolves into noise and has lost its reward"
    return None


def silent(value: float, past: Past, standing: Standing, limit: int) -> str | None:
    """Groups without variance at a low reward."""
    if past.least == 1:  # one rollout a group, or turns alone are paid: it never said anything
        return None
    more = value > past.level + max(0.2, past.margin)
    if value >= 0.8 and (standing.lost or (more and not standing.earning)):
        return "hardly a group of rollouts differs in reward, and the reward is low"
    return None


def stuck(value: float, past: Past, standing: Standing, limit: int) -> str | None:
    """All episodes end in the first turn, or none does before the limit."""
    if limit == 1 or standing.earning:
        return None
    if value < 1.1 and value < past.level - max(0.3, past.margin):
        return "episodes end in their first turn, so the tools are no longer used"
    if value > 0.95 * limit and value > past.level + max(0.1 * limit, past.margin):
        return "episodes run to the limit of turns without an answer"
    return None


def malformed(value: float, past: Past, standing: Standing, limit: int) -> str | None:
    """Most calls are mistakes."""
    if value >= 0.5 and value > past.level + max(0.25, past.margin):
        return "most calls are malformed"
    return None


RULES = {
    "displacement": displaced,
    "entropy": dissolved,
    "silent groups": silent,
    "turns": stuck,
    "invalid calls": malformed,
}
"""Signal to rule: (value, past, standing, limit of turns) -> what is wrong, or None."""


class Judge:
    """Watches one run.

    Args:
        max_turns: limit of an episode.
        judged: records whose means are judged, see `records_judged`.
    """

    def __init__(self, max_turns: int, judged: int = RECENT) -> None:
        self._limit = max_turns
        self._judged = judged
        self._records: list[dict[str, float]] = []
        self._cooling = 0
        self._paid: list[float] = []  # least and most of an episode or an observation
        self._start: float | None = None  # mean rewards of `_span` records
        self._best: float | None = None

    @property
    def _span(self) -> int:
        return max(WARM_UP, self._judged)

    def scale(self, rewards: Iterable[float]) -> None:
        """Tell what single episodes were paid: a mean reward is high or low among those."""
        found = [r for r in (*self._paid, *rewards) if isfinite(r)]
        self._paid = [min(found), max(found)] if found else []

    def observe(self, reward: float, signals: Mapping[str, float]) -> Alarm | None:
        """Take one record of training.

        Args:
            reward: mean over its episodes. A record without a number says nothing.
            signals: those of `RULES` that it has.

        Returns:
            The first signal that has left its past.
        """
        if not isfinite(reward):
            return None
        self.scale([reward])
        if self._cooling:
            self._cooling -= 1
            return None
        finite = {name: value for name, value in signals.items() if isfinite(value)}
        self._remember({"reward": reward} | finite)
        standing = self._standing()
        for name in RULES:
            alarm = self._alarm(name, standing)
            if alarm is not None:
                del self._records[-self._window(name) :]  # none of it belongs to the healthy past
                self._cooling = COOL_DOWN
                return alarm
        return None

    def _remember(self, seen: dict[str, float]) -> None:
        self._records = [*self._records, seen][-(MEMORY + self._judged) :]
        rewards = [record["reward"] for record in self._records]
        if self._start is None and len(rewards) == self._span:
            self._start = fmean(rewards)
        settled = rewards[: -self._judged][-self._span :]
        if len(settled) == self._span:
            mean = fmean(settled)
            self._best = mean if self._best is None else max(self._best, mean)

    def _window(self, name: str) -> int:
        return RECENT if name == "displacement" else self._judged

    def _alarm(self, name: str, standing: Standing) -> Alarm | None:
        count, rule = self._window(name), RULES[name]
        values = [seen[name] for seen in self._records[:-count][-MEMORY:] if name in seen]
        latest = [seen[name] for seen in self._records[-count:] if name in seen]
        if len(values) < WARM_UP or any(name not in seen for seen in self._records[-RECENT:]):
            return None
        past = Past(level(values), min(values), margin=0.0)
        if not all(rule(value, past, standing, self._limit) for value in latest[-RECENT:]):
            return None
        past = past._replace(margin=noise(values, SPIKES) * errors(len(latest), len(values)))
        meaning = rule(fmean(latest), past, standing, self._limit)
        return Alarm(name, latest[-1], past.level, meaning) if meaning else None

    def _standing(self) -> Standing:
        """Gains show in the mean of twice as many records as losses."""
        rewards = [seen["reward"] for seen in self._records]
        before, now = rewards[: -self._judged], rewards[-self._judged :]
        if self._start is None or self._best is None or len(before) < WARM_UP:  # not known yet
            return Standing(earning=True, lost=False)
        least, most = self._paid
        spread = noise(before)
        fall = spread * errors(self._judged, self._span)
        lost = max(now[-RECENT:]) < self._best - 0.25 * (self._best - least)
        lost = lost and fmean(now) < self._best - fall
        mean = fmean(rewards[-2 * self._judged :])
        learned = mean > self._start + max(spread, 0.1 * (most - least))
        high = mean > least + 0.8 * (most - least)
        return Standing(not lost and (learned or high), lost)

    def resume(self) -> None:
        """The run is healthy again, by what was done about the alarm: judge on at once."""
        self._cooling = 0

    def state(self) -> dict[str, Any]:
        """Everything it knows, as JSON."""
        known = {name: value for name, value in vars(self).items() if name not in _GIVEN}
        return {name.lstrip("_"): copy.deepcopy(value) for name, value in known.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where another judge of the same arguments was when it gave its `state()`."""
        for name, value in state.items():
            setattr(self, f"_{name}", value)


_GIVEN = ("_limit", "_judged")
"""Attributes of a judge that are its arguments."""
