"""Many episodes in step, so that who is back from a tool first cannot change a number.

Layer 3, between `rollout` and an engine, for evaluation alone. A batch's shape decides how a
processor rounds, and a rounding can tip a greedy choice. Here no turn begins before all episodes
still under way have asked for theirs, and they ask in a fixed order: the engine sees the same
requests in the same batches every time, however long tools took. The price is that every turn
waits for the slowest tool, which a rollout in training never does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from agentr1.engines.base import Engine, Generation, Sampling
from agentr1.envs.base import Env, EnvFactory
from agentr1.types import Message, Row, StepResult


class Lockstep(Engine):
    """An engine that begins a turn for all episodes at once.

    Args:
        engine: samples the actions; told apart by `Sampling.episode`.
        episodes: how many there are; each must play in an environment of `attended`.
        ended: called whenever one is over.
    """

    def __init__(
        self, engine: Engine, episodes: int, ended: Callable[[], None] | None = None
    ) -> None:
        self._engine = engine
        self._under_way = episodes
        self._ended = ended
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Wait for the others, then sample; see `Engine.generate`."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((sampling.episode, turn))
        self._begin_turn()
        await turn
        return await self._engine.generate(prompt_ids, sampling)

    def sync(self, model: Any) -> None:
        """Hand new weights through."""
        self._engine.sync(model)

    def attended(self, env_factory: EnvFactory) -> EnvFactory:
        """Environments that say when their episode is over: nobody waits for it then."""
        return lambda: _Attended(env_factory(), self._leave)

    def _leave(self) -> None:
        self._under_way -= 1
        if self._ended is not None:
            self._ended()
        self._begin_turn()

    def _begin_turn(self) -> None:
        if self._waiting and len(self._waiting) >= self._under_way:
            together, self._waiting = self._waiting, []
            # Soon, not now: whoever came last would go on at once and be first.
            asyncio.get_running_loop().call_soon(_wake, together)


def _wake(together: list[tuple[int, asyncio.Future[None]]]) -> None:
    """Let episodes go on in their order; tasks resume in the order their futures are set."""
    for _, turn in sorted(together, key=lambda waiting: waiting[0]):
        if not turn.done():  # cancelled
            turn.set_result(None)


class _Attended(Env):
    """Another environment, unchanged but for the word when it is closed."""

    def __init__(self, env: Env, leave: Callable[[], None]) -> None:
        self._env = env
        self._leave = leave

    @property
    def tool_schemas(self) -> Sequence[dict[str, Any]]:
        return self._env.tool_schemas

    async def reset(self, row: Row) -> Sequence[Message]:
        return await self._env.reset(row)

    async def step(self, message: Message) -> StepResult:
        return await self._env.step(message)

    async def close(self) -> None:
        try:
            await self._env.close()
        finally:
            self._leave()
