"""Rollouts whose tools mostly answer soon and sometimes very late, against TRL and the floor.

Waits are log-normal (median 0.3 s, 99th percentile 6 s), and each call waits equally long on both
sides. TRL's loop takes the waits of all calls one after another, ours those of the longest
trajectory. So a draw has a ceiling, which no scheduler gets above: all waits plus TRL's compute,
over the longest trajectory's waits plus our compute. What is judged is the share of it reached.

    python -m benchmarks.heavy_tail --json heavy_tail.json
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import statistics
import sys
from collections.abc import Sequence

from benchmarks import work
from benchmarks.comparison import Comparison, finish, medians, no_more
from benchmarks.rollout import FLOOR_TARGET
from benchmarks.sides import seconds

MEDIAN, P99 = 0.3, 6.0
"""Seconds of a call."""
TARGET = 0.8
"""The least share of the ceiling."""
TRIAL_ROLLOUTS = 16
"""TRL's way is chosen with so many: on a CPU, continuous batching takes their square."""


def draw(seed: int, rollouts: int, calls: int, scale: float = 1.0) -> list[list[float]]:
    """The waits of every rollout's calls.

    Args:
        seed: of the draw.
        rollouts: how many.
        calls: of each rollout.
        scale: multiplies all of them.
    """
    uniform = random.Random(seed)
    sigma = math.log(P99 / MEDIAN) / statistics.NormalDist().inv_cdf(0.99)
    return [
        [scale * MEDIAN * math.exp(sigma * uniform.gauss()) for _ in range(calls)]
        for _ in range(rollouts)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 where a target is missed."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.calls != 1:
        parser.error("the ceiling is that of one call a turn; leave --calls out")
    work.quiet(options.threads)
    script = work.write(options)
    few = argparse.Namespace(**vars(options) | {"rollouts": min(options.rollouts, TRIAL_ROLLOUTS)})
    players = work.gather(script, work.model_of(options.policy), options, work.write(few))
    sides = [functools.partial(seconds, player.play) for player in players]
    work.wait_equally(script, options, 0.0)
    compute = medians(*sides, repeats=options.repeats, patience=options.patience)
    lines, name = [], players.theirs.name
    for seed in options.seeds:
        script.slow.takes(draw(seed, options.rollouts, options.turns, options.scale))
        took = medians(*sides[:2], repeats=options.repeats, patience=options.patience)
        lines += judged(script, options, seed, compute=compute, took=took, theirs=name)
    return finish(lines, options.json)


def judged(
    script: work.Work,
    options: argparse.Namespace,
    seed: int,
    *,
    compute: Sequence[float],
    took: Sequence[float],
    theirs: str,
) -> list[Comparison]:
    """Two lines for one draw.

    Args:
        script: with the waits of the draw.
        options: of the command.
        seed: of the draw.
        compute: seconds of ours, theirs and the floor where the tool takes no time.
        took: seconds of ours and theirs with the draw's waits.
        theirs: TRL's way.
    """
    name = f"heavy tail, draw {seed}"
    slow = script.slow
    ratio = took[1] / took[0]
    ceiling = (slow.total + compute[1]) / (slow.longest + compute[0])
    workload = work.describe(script, options, theirs) | {
        "seed": seed,
        "waits_s": round(slow.total, 2),
        "longest_trajectory_waits_s": round(slow.longest, 2),
        "compute_s": [round(part, 3) for part in compute],
        "ratio": round(ratio, 3),
        "ceiling": round(ceiling, 3),
    }
    return [
        Comparison(
            name,
            ratio / ceiling,
            workload,
            unit="of ceiling",
            target=TARGET,
            ours=took[0],
            theirs=took[1],
            note=f"ratio {ratio:.1f}x, ceiling {ceiling:.1f}x",
        ),
        no_more(
            f"{name}: over floor", (took[0], compute[2] + slow.longest), workload, FLOOR_TARGET
        ),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = work.arguments("heavy_tail", "Time rollouts whose tools are sometimes very late.")
    parser.set_defaults(rollouts=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one per draw")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every wait")
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        help="seconds after which a side is not run again, though `repeats` are not reached",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
