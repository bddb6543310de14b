"""Play rows greedily and score them: the one evaluation that training and `agentr1 eval` share.

Knows rollouts and metrics, neither trainers nor recipes. Results are keyed by row id, so the
order of the rows and the number of processes cannot change a score.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agentr1.engines.base import Engine, Sampling
from agentr1.envs.base import EnvFactory
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
    """

    row_id: str
    values: Mapping[str, float]
    trajectory: Trajectory


def evaluate_rows(
    rows: Sequence[Row],
    env_factory: EnvFactory,
    codec: TokenCodec,
    engine: Engine,
    *,
    limits: Limits,
    metrics: Mapping[str, Metric],
) -> list[Scored]:
    """Play every row once with temperature 0 and score it.

    Args:
        rows: each with an `id`, unique among them.
        env_factory: called once per row.
        codec: of the engine's tokenizer.
        engine: has the weights to be judged.
        limits: as in training.
        metrics: name to function.

    Returns:
        One record per row, in the order of the rows.
    """
    greedy = [Sampling(max_tokens=1, temperature=0.0)] * len(rows)
    trajectories = finish(
        rollout_batch(rows, env_factory, codec, engine, limits=limits, samplings=greedy)
    )
    return score(trajectories, metrics)


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


def summary(scored: Sequence[Scored]) -> dict[str, Any]:
    """Mean and bootstrap 95% interval of each metric, and how the episodes went.

    Returns:
        `{metric: mean, "ci95": [low, high] of the first metric, "intervals": {metric: [low,
        high]}, "n", "turns", "calls", "stop_reasons"}`.
    """
    names = list(scored[0].values) if scored else []
    intervals = {name: mean_ci([s.values[name] for s in scored]) for name in names}
    trajectories = [s.trajectory for s in scored]
    return {
        **{name: interval.mean for name, interval in intervals.items()},
        "ci95": [intervals[names[0]].low, intervals[names[0]].high] if names else [],
        "intervals": {name: [i.low, i.high] for name, i in intervals.items()},
        "n": len(scored),
        **episode_means(trajectories),
        "stop_reasons": dict(Counter(str(t.stop_reason) for t in trajectories)),
    }


def episode_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Per-episode means of turns and of every number the environments reported."""
    n = max(1, len(trajectories))
    totals: defaultdict[str, float] = defaultdict(float)
    for trajectory in trajectories:
        totals["turns"] += len(trajectory.turns)
        totals["truncated"] += not trajectory.stop_reason.is_terminal
        totals["process_reward"] += sum(trajectory.process_rewards)
        for name, value in (item for turn in trajectory.turns for item in turn.info.items()):
            totals[name] += value
    return {name: total / n for name, total in totals.items()}
