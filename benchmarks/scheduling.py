"""What the machinery costs when nothing else does: an engine and a tool that answer at once.

Everything between two model calls is timed: `rollout_batch`, the codec, `ToolEnv`, parsing,
validation and the tool's run. 512 rollouts share the loop, so a millisecond of a turn is half a
second in which no token is computed.

    python -m benchmarks.scheduling --json scheduling.json
    python -m benchmarks.scheduling --profile
"""

from __future__ import annotations

import asyncio
import cProfile
import functools
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from agentr1.engines.base import Engine, Generation, Sampling
from agentr1.envs.tool_env import ToolEnv
from agentr1.rollout import Limits, rollout_batch
from agentr1.tools.base import tool
from agentr1.tools.policy import ToolPolicy
from agentr1.tools.runner import ToolRunner
from benchmarks import work
from benchmarks.comparison import Comparison, finish, medians
from benchmarks.script import Script

TARGET_MS = 0.5
"""Milliseconds of a turn, at most."""


class Instant(Engine):
    """Says what the script says, at once."""

    def __init__(self, script: Script) -> None:
        lengths = [
            len(action) + len(shown)
            for action, shown in zip(script.action_ids, script.observation_ids, strict=False)
        ]
        starts = [script.prompt_length + sum(lengths[:k]) for k in range(len(lengths) + 1)]
        self._turns = {
            start: Generation(ids, (-1.0,) * len(ids), "stop")
            for start, ids in zip(starts, script.action_ids, strict=True)
        }

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """The action that stands where the prompt ends; other episodes come between."""
        await asyncio.sleep(0)
        return self._turns[len(prompt_ids)]

    def sync(self, model: Any) -> None:
        """Texts do not depend on weights."""


class Machinery:
    """`rollout_batch` with that engine."""

    def __init__(self, script: work.Work, search: Callable[..., Any]) -> None:
        self.script, self.codec, self.slow = script.script, script.codec, script.slow
        policy = ToolPolicy(concurrency=len(self.script.rows))
        self.runner = ToolRunner([tool(search)], default_policy=policy)
        self.engine = Instant(self.script)
        self.limits = Limits(len(self.script.action_ids), 2 * len(self.script.completion_ids))
        self.samplings = [Sampling(1, seed=i) for i in range(len(self.script.rows))]
        self.cpu: list[float] = []

    def play(self) -> float:
        """Seconds of all episodes; those of this process alone are kept in `cpu`."""
        start, cpu = time.perf_counter(), time.process_time()
        trajectories = asyncio.run(
            rollout_batch(
                self.script.rows,
                lambda: ToolEnv(self.runner, self.script.system_prompt),
                self.codec,
                self.engine,
                limits=self.limits,
                samplings=self.samplings,
            )
        )
        took = time.perf_counter() - start
        self.cpu.append(time.process_time() - cpu)
        for trajectory in trajectories:
            said = [turn.action_ids for turn in trajectory.turns]
            shown = [turn.observation_ids for turn in trajectory.turns[:-1]]
            if (said, shown) != (self.script.action_ids, self.script.observation_ids):
                raise RuntimeError(f"expected the script, got {trajectory.turns}")
        return took


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 where the target is missed."""
    parser = work.arguments("scheduling", "Time the machinery between two model calls.")
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead")
    parser.set_defaults(rollouts=512, group=8, turns=6)
    options = parser.parse_args(argv)
    work.quiet(options.threads)
    script = work.write(options)
    found = script.slow.found

    def search(query: str) -> str:
        """Search the corpus for passages.

        Args:
            query: What to look for.
        """
        return found

    # An instant tool has no reason to leave the event loop; a blocking one pays for a thread.
    @functools.wraps(search)
    async def search_async(query: str) -> str:
        return found

    sides = {"asynchronous": search_async, "blocking": search}
    players = {name: Machinery(script, function) for name, function in sides.items()}
    if options.profile:
        return _profile(players["asynchronous"])
    for player in players.values():
        player.play()  # warms up
    took = medians(*(player.play for player in players.values()), repeats=options.repeats)
    turns = options.rollouts * (options.turns + 1)
    workload = work.describe(script, options)
    lines = [
        Comparison(
            f"scheduling, {name} tool",
            1000 * seconds / turns,
            workload,
            unit="ms/turn",
            target=TARGET_MS if name == "asynchronous" else None,
            direction="at most",
            ours=seconds,
            note=f"{1000 * statistics.median(player.cpu) / turns:.2f} ms of the processor",
        )
        for (name, player), seconds in zip(players.items(), took, strict=True)
    ]
    return finish(lines, options.json)


def _profile(player: Machinery) -> int:
    player.play()
    profile = cProfile.Profile()
    profile.runcall(player.play)
    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
    return 0


if __name__ == "__main__":
    sys.exit(main())
