"""Our rollout against the tool loop of TRL 1.16 and against its own floor, on the same work.

Every call of the tool takes the same time. TRL takes part with the fastest, in a trial, of its
engines and kinds of tools; the floor is the compute of the same tokens in lock step plus the waits
of one trajectory.

    python -m benchmarks.rollout --json rollout.json
    python -m benchmarks.rollout --policy HuggingFaceTB/SmolLM2-135M-Instruct --latency 0 0.5
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

from benchmarks import work
from benchmarks.comparison import Comparison, faster, finish, medians, no_more
from benchmarks.sides import Floor, Ours, check_equal, seconds

TARGETS: dict[tuple[str, float], float] = {
    ("quickstart", 0.1): 3.0,
    ("quickstart", 0.5): 8.0,
    ("quickstart", 2.0): 12.0,
    ("SmolLM2-135M", 0.0): 1.8,
    ("SmolLM2-135M", 0.5): 2.3,
}
"""Policy and seconds a tool takes -> the least ratio to TRL."""
FLOOR_TARGET = 1.25
"""At most so many times the floor, wherever there is a target against TRL."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 where a target is missed."""
    options = _parser().parse_args(argv)
    work.quiet(options.threads)
    script = work.write(options)
    model = work.model_of(options.policy)
    if options.floor_only:
        ours, floor = Ours(model, *script[1:]), Floor(model, script.script)
        check_equal(ours.play(), floor.play(), script.script)
        lines = [_over_floor(script, options, latency, ours, floor) for latency in options.latency]
    else:
        players = work.gather(script, model, options)
        lines = [
            line
            for latency in options.latency
            for line in measured(script, players, options, latency)
        ]
    return finish(lines, options.json)


def measured(
    script: work.Work, players: work.Players, options: argparse.Namespace, latency: float
) -> list[Comparison]:
    """Time the three sides in turn with a tool of one latency."""
    work.wait_equally(script, options, latency)
    ours, theirs, compute = medians(
        *(functools.partial(seconds, player.play) for player in (players.ours, players.theirs)),
        functools.partial(seconds, players.floor.play),
        repeats=options.repeats,
        patience=options.patience,
    )
    floor = compute + script.slow.longest
    policy = work.short_name(options.policy)
    name = f"{policy}, tool {latency:g} s"
    target = TARGETS.get((policy, latency))
    workload = work.describe(script, options, players.theirs.name)
    workload |= {"latency_s": latency, "possible_ratio": round(theirs / floor, 2)}
    return [
        faster(name, (ours, theirs), workload, target, f"possible: {theirs / floor:.1f}x"),
        no_more(f"{name}: over floor", (ours, floor), workload, FLOOR_TARGET if target else None),
    ]


def _over_floor(
    script: work.Work, options: argparse.Namespace, latency: float, ours: Ours, floor: Floor
) -> Comparison:
    """The second of those lines alone, quickly: what there is to gain."""
    work.wait_equally(script, options, latency)
    took, compute = medians(
        functools.partial(seconds, ours.play),
        functools.partial(seconds, floor.play),
        repeats=options.repeats,
    )
    policy = work.short_name(options.policy)
    return no_more(
        f"{policy}, tool {latency:g} s: over floor",
        (took, compute + script.slow.longest),
        work.describe(script, options) | {"latency_s": latency},
        FLOOR_TARGET if (policy, latency) in TARGETS else None,
    )


def _parser() -> argparse.ArgumentParser:
    parser = work.arguments(
        "rollout", "Time our rollout against the tool loop of TRL and against its floor."
    )
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 0.1, 0.5, 2.0])
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        help="seconds after which a side is not run again, though `repeats` are not reached",
    )
    parser.add_argument("--floor-only", action="store_true", help="leave TRL out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
