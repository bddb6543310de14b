"""The multi-turn loop, and many of them at once.

One coroutine per episode: prompt, then action and observation in turn, until the environment ends
it or a limit does. A rollout knows turns and limits and never which tools exist. It is called by
the trainer and by evaluation; everything it writes down is in `Trajectory`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Protocol

from agentr1.engines.base import Engine, Sampling
from agentr1.envs.base import Env, EnvFactory
from agentr1.types import Message, Row, StepResult, StopReason, Trajectory, Turn

FIRST_STATE = ""
"""Anchor of every first turn: the rollouts of a row all start from it."""


class TokenCodec(Protocol):
    """The part of `codec.Codec` a rollout uses."""

    def prompt(
        self, messages: Sequence[Message], said: Sequence[tuple[Message, Sequence[int]]] = ()
    ) -> tuple[int, ...]:
        """Encode a whole conversation up to the next action; `said` are the policy's own ids."""
        ...

    def observation(
        self, observation: Sequence[Message], action_ids: Sequence[int]
    ) -> tuple[int, ...]:
        """Encode what stands between an action and the next one."""
        ...

    def message(self, action_ids: Sequence[int], cut: bool = False) -> Message:
        """Decode an action."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What may truncate an episode.

    Attributes:
        max_turns: model calls.
        max_completion_length: tokens after the prompt, actions and observations together; counted
            anew when the environment rewrites the context.
        max_turn_tokens: sampled tokens of one turn; None leaves it to the budget.
        max_observation_tokens: tokens of all observations together; None leaves it to the budget.
        max_seconds: wall-clock time of one episode, looked at between turns and while the
            environment works; None for no limit.
    """

    max_turns: int = 8
    max_completion_length: int = 1024
    max_turn_tokens: int | None = None
    max_observation_tokens: int | None = None
    max_seconds: float | None = None


async def rollout(
    row: Row, env: Env, codec: TokenCodec, engine: Engine, *, limits: Limits, sampling: Sampling
) -> Trajectory:
    """Play one episode.

    Args:
        row: the dataset row to start from.
        env: a fresh environment; closing it is the caller's business.
        codec: of the engine's tokenizer.
        engine: samples the actions.
        limits: where the episode is truncated.
        sampling: temperature and seed; `max_tokens` is overruled by the limits. Turn k draws
            with its own seed, derived from this one.

    Returns:
        The record of the episode, with at least one turn.
    """
    clock = _Clock(limits)
    prompt = tuple(await env.reset(row))
    context = codec.prompt(prompt)
    opening: tuple[int, ...] | None = context
    budget = limits.max_completion_length
    unseen = limits.max_observation_tokens or math.inf  # what may still be shown
    turns: list[Turn] = []
    stop: StopReason | None = None
    anchor: str | None = FIRST_STATE
    while stop is None:
        draw = dataclasses.replace(
            sampling,
            max_tokens=min(budget, limits.max_turn_tokens or budget),
            seed=sampling.seed * 1_000_003 + len(turns),
        )
        generation = await engine.generate(context, draw)
        budget -= len(generation.ids)
        message = codec.message(generation.ids, cut=generation.finish_reason == "length")
        if message.cut and budget <= 0:  # an incomplete action: the environment is not asked
            result, stop = StepResult(), StopReason.MAX_TOKENS
        else:
            result, stop = await clock.step(env, message)
        stop = stop or clock.limit_reached(turns_played=len(turns) + 1)
        rewritten = stop is None and result.rewrite is not None
        # A rewritten context has a budget of its own, and holds the observation already.
        room = unseen if rewritten else min(budget, unseen)
        shown, observation = _shown(codec, result, generation.ids, room)
        if stop is None and result.observation and not observation:
            stop = StopReason.MAX_TOKENS if room == budget else StopReason.MAX_OBSERVATION_TOKENS
        unseen -= len(shown)
        shown = () if rewritten else shown
        turns.append(
            Turn(
                action_ids=generation.ids,
                logprobs=generation.logprobs,
                message=message,
                observation_ids=shown,
                prompt_ids=opening,
                observation=observation,
                reward=result.reward,
                fault=result.fault,
                info=result.info,
                anchor=anchor,
            )
        )
        opening, anchor = None, result.anchor
        if result.rewrite is not None and stop is None:
            said = [(turn.message, turn.action_ids) for turn in turns]
            opening = context = codec.prompt(result.rewrite, said)
            budget = limits.max_completion_length
            continue
        context = (*context, *generation.ids, *shown)
        budget -= len(shown)
        if budget <= 0:
            stop = stop or StopReason.MAX_TOKENS
    return Trajectory(row, prompt, tuple(turns), stop, clock.seconds)


async def rollout_batch(
    rows: Sequence[Row],
    env_factory: EnvFactory,
    codec: TokenCodec,
    engine: Engine,
    *,
    limits: Limits,
    samplings: Sequence[Sampling],
    group_size: int = 1,
    spare: int = 0,
) -> list[Trajectory]:
    """Play one episode per row, all at once; none waits for another.

    Args:
        rows: dataset rows; the equal ones of a group stand together.
        env_factory: called once per episode.
        codec: of the engine's tokenizer.
        engine: samples the actions.
        limits: where an episode is truncated.
        samplings: one per episode: `group_size + spare` for each group.
        group_size: episodes of a group that are kept; divides the number of rows.
        spare: episodes of a group beyond those. The first `group_size` to end are kept and the
            stragglers are cut, so that one slow tool does not hold up the batch; what is kept
            leans towards episodes that end early.

    Returns:
        One trajectory per row, in the order of the rows.

    Raises:
        RuntimeError: an environment raised. The other episodes are cancelled and every
            environment is closed first; the message names the row.
    """
    started = group_size + spare
    ended: list[list[int]] = [[] for _ in range(len(rows) // group_size)]
    tasks: list[asyncio.Task[Trajectory]] = []

    async def play(i: int) -> Trajectory:
        group, member = divmod(i, started)
        row = rows[group * group_size + min(member, group_size - 1)]
        sampling = dataclasses.replace(samplings[i], episode=i)
        trajectory = await _episode(
            row, env_factory, codec, engine, limits=limits, sampling=sampling
        )
        ended[group].append(i)
        if spare and len(ended[group]) == group_size:
            for other in range(group * started, (group + 1) * started):
                if other not in ended[group]:
                    tasks[other].cancel()
        return trajectory

    try:
        async with asyncio.TaskGroup() as all_of_them:
            tasks += [all_of_them.create_task(play(i)) for i in range(len(ended) * started)]
    except ExceptionGroup as failures:
        first = failures.exceptions[0]
        raise first from first.__cause__  # the author's own exception, not the group
    return [tasks[i].result() for group in ended for i in sorted(group[:group_size])]


async def _episode(
    row: Row,
    env_factory: EnvFactory,
    codec: TokenCodec,
    engine: Engine,
    *,
    limits: Limits,
    sampling: Sampling,
) -> Trajectory:
    """Play one row in an environment of its own, and close that in any case."""
    try:
        env = env_factory()
        try:
            return await rollout(row, env, codec, engine, limits=limits, sampling=sampling)
        finally:
            await env.close()
    except (Exception, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise  # cut by us; otherwise something the environment awaited was cancelled
        raise RuntimeError(
            f"the episode of row {row.get('id', dict(row))!r} failed: "
            f"{type(error).__name__}: {error}"
        ) from error


class _Clock:
    """The wall clock and the turn count of one episode."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    async def step(self, env: Env, message: Message) -> tuple[StepResult, StopReason | None]:
        """`Env.step` within the time that is left; an overrun leaves no observation."""
        limit = self._limits.max_seconds
        left = None if limit is None else max(0.0, limit - self.seconds)
        scope = asyncio.timeout(left)
        try:
            async with scope:
                result = await env.step(message)
        except TimeoutError:
            if not scope.expired():  # the environment's own exception
                raise
            return StepResult(), StopReason.MAX_TIME
        if result.terminated:
            return result, StopReason.ENVIRONMENT
        if not (result.truncated or result.observation or result.rewrite is not None):
            raise ValueError(
                "step must return an observation, a rewrite or the end of the episode, got "
                f"{result!r}"
            )
        return result, StopReason.ENVIRONMENT_LIMIT if result.truncated else None

    def limit_reached(self, turns_played: int) -> StopReason | None:
        """The limit that ends the episode between two turns, if one does."""
        if turns_played >= self._limits.max_turns:
            return StopReason.MAX_TURNS
        if self._limits.max_seconds is not None and self.seconds >= self._limits.max_seconds:
            return StopReason.MAX_TIME
        return None


def _shown(
    codec: TokenCodec, result: StepResult, action_ids: Sequence[int], room: float
) -> tuple[tuple[int, ...], tuple[Message, ...]]:
    """What of the observation enters the context: all of it or, where it does not fit, nothing.

    After termination nothing follows the policy's last token; after truncation the observation
    stays, since a critic values the state behind it.
    """
    if result.terminated or not result.observation:
        return (), ()
    ids = codec.observation(result.observation, action_ids)
    return (ids, result.observation) if len(ids) <= room else ((), ())
