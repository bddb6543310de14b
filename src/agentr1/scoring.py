"""Play rows and score them: the metrics and summaries that training and `agentr1 eval` share.

Knows rollouts and metrics, neither trainers nor recipes. Results are keyed by row id.
`evaluate_rows`, with which `agentr1 eval` plays, goes by the order of ids and in step, so that
neither the rows' order nor the time that tools take can change a score. A training's own tests play
as the training does, without waiting for the slowest tool.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from agentr1.engines.base import Engine, Sampling
from agentr1.envs.base import EnvFactory
from agentr1.lockstep import Lockstep
from agentr1.loops import finish
from agentr1.rollout import Limits, TokenCodec, rollout_batch
from agentr1.statistics import mean_ci
from agentr1.types import Row, Trajectory

Metric = Callable[..., Sequence[float]]
"""`metric(trajectories=...)` gives one number per trajectory; outcome rewards have this shape."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scored:
    """One evaluated row.

    Attributes:
        row_id: the row's `id`, or its position as text.
        values: metric name to value.
        trajectory: the whole episode.
        wall_seconds: this row's share of the time that the rows played with it took together.
    """

    row_id: str
    values: Mapping[str, float]
    trajectory: Trajectory
    wall_seconds: float = dataclasses.field(default=0.0, compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What remains of an evaluated row once its tokens and messages are counted.

    Attributes:
        row_id: see `Scored`.
        values: metric name to value.
        numbers: turns, calls, tokens, seconds and every number the environment reported.
        stop_reason: why the episode ended.
        row: the row itself.
    """

    row_id: str
    values: Mapping[str, float]
    numbers: Mapping[str, float]
    stop_reason: str
    row: Row


def evaluate_rows(
    rows: Sequence[Row],
    env_factory: EnvFactory,
    codec: TokenCodec,
    engine: Engine,
    *,
    limits: Limits,
    metrics: Mapping[str, Metric],
    temperature: float = 0.0,
    ended: Callable[[], None] | None = None,
) -> list[Scored]:
    """Play every row once and score it.

    The engine starts from an empty cache and sees the rows in the order of their ids: the same rows
    give the same tokens, whatever came before them.

    Args:
        rows: each with an `id`, unique among them.
        env_factory: called once per row.
        codec: of the engine's tokenizer.
        engine: has the weights to be judged.
        limits: as in training.
        metrics: name to function.
        temperature: 0 is greedy; otherwise a row's draws are seeded by its id.
        ended: called whenever an episode is over.

    Returns:
        One record per row, in the order of the rows.
    """
    ids = [str(row.get("id", i)) for i, row in enumerate(rows)]
    order = sorted(range(len(rows)), key=ids.__getitem__)
    samplings = [
        Sampling(max_tokens=1, temperature=temperature, seed=zlib.crc32(ids[i].encode()))
        for i in order
    ]
    engine.release()
    started = time.perf_counter()
    in_step = Lockstep(engine, len(rows), ended)
    played = finish(
        rollout_batch(
            [rows[i] for i in order],
            in_step.attended(env_factory),
            codec,
            in_step,
            limits=limits,
            samplings=samplings,
        )
    )
    share = (time.perf_counter() - started) / max(1, len(rows))
    by_place = dict(zip(order, played, strict=True))
    scored = score([by_place[i] for i in range(len(rows))], metrics)
    return [dataclasses.replace(s, wall_seconds=share) for s in scored]


def score(trajectories: Sequence[Trajectory], metrics: Mapping[str, Metric]) -> list[Scored]:
    """Apply every metric to every trajectory."""
    columns = {name: metric(trajectories=trajectories) for name, metric in metrics.items()}
    return [
        Scored(
            row_id=str(trajectory.row.get("id", i)),
            values={name: float(column[i]) for name, column in columns.items()},
            trajectory=trajectory,
        )
        for i, trajectory in enumerate(trajectories)
    ]


def outcome(scored: Scored) -> Outcome:
    """Count an evaluated row, so that many need no memory."""
    t = scored.trajectory
    numbers = _numbers(t) | {
        "prompt_tokens": float(sum(len(turn.prompt_ids or ()) for turn in t.turns)),
        "generated_tokens": float(sum(len(turn.action_ids) for turn in t.turns)),
        "observation_tokens": float(sum(len(turn.observation_ids) for turn in t.turns)),
        "faulty_turns": float(sum(turn.fault is not None for turn in t.turns)),
        "seconds": t.seconds,
        "wall_seconds": scored.wall_seconds,
    }
    return Outcome(scored.row_id, scored.values, numbers, str(t.stop_reason), t.row)


def summary(scored: Sequence[Scored]) -> dict[str, Any]:
    """Mean and bootstrap 95% interval of each metric, and how the episodes went.

    Returns:
        `{metric: mean, "ci95": [low, high] of the first metric, "intervals": {metric: [low,
        high]}, "n", "turns", "calls", ..., "stop_reasons"}`; see `summary_of`.
    """
    return summary_of([outcome(s) for s in scored])


def summary_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What `summary` returns, from rows that are counted.

    Per episode: turns, calls, tokens and every number the environments reported, each by its mean;
    seconds also by their median and 95th percentile, `wall_seconds` in all. `fault_share` is of
    turns.
    """
    names = list(outcomes[0].values) if outcomes else []
    intervals = {name: mean_ci([o.values[name] for o in outcomes]) for name in names}
    means = _means([o.numbers for o in outcomes])
    faulty, turns = means.pop("faulty_turns", 0.0), means.get("turns", 0.0)
    seconds = [o.numbers["seconds"] for o in outcomes] or [0.0]
    return {
        **{name: interval.mean for name, interval in intervals.items()},
        "ci95": [intervals[names[0]].low, intervals[names[0]].high] if names else [],
        "intervals": {name: [i.low, i.high] for name, i in intervals.items()},
        "n": len(outcomes),
        **means,
        "seconds_median": float(np.median(seconds)),
        "seconds_p95": float(np.quantile(seconds, 0.95)),
        "wall_seconds": sum((o.numbers["wall_seconds"] for o in outcomes), start=0.0),
        "fault_share": faulty / turns if turns else 0.0,
        "stop_reasons": dict(Counter(o.stop_reason for o in outcomes)),
    }


def episode_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Per-episode means of turns and of every number the environments reported."""
    return _means([_numbers(trajectory) for trajectory in trajectories])


def _numbers(trajectory: Trajectory) -> dict[str, float]:
    totals: defaultdict[str, float] = defaultdict(float)
    totals["turns"] = float(len(trajectory.turns))
    totals["truncated"] = float(not trajectory.stop_reason.is_terminal)
    totals["process_reward"] = sum(trajectory.process_rewards, start=0.0)
    for name, value in (item for turn in trajectory.turns for item in turn.info.items()):
        totals[name] += value
    return dict(totals)


def _means(episodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each number over all episodes; one that does not report it counts as 0."""
    totals: defaultdict[str, float] = defaultdict(float)
    for name, value in (item for numbers in episodes for item in numbers.items()):
        totals[name] += value
    return {name: total / len(episodes) for name, total in totals.items()}
