"""In step: the engine is asked the same things in the same order, however long tools take."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agentr1.engines.base import Engine, Generation, Sampling
from agentr1.engines.in_process import InProcessEngine
from agentr1.lockstep import Lockstep
from agentr1.loops import finish
from agentr1.rollout import Limits, rollout_batch
from agentr1.scoring import evaluate_rows
from agentr1.types import Message, Row, StepResult, Trajectory
from fakes import GuessEnv, ScriptedPolicy

ROWS = [{"id": f"r{i}", "secret": i, "question": f"Game {i}. "} for i in range(6)]
SCRIPTS = {f"Game {i}. ": ["none"] * i + [str(i)] for i in range(6)}
LIMITS = Limits(max_turns=8, max_completion_length=600, max_turn_tokens=12)


class Delayed(GuessEnv):
    """Answers after a while that nobody can foresee."""

    chance = random.Random(0)

    async def reset(self, row: Row) -> Sequence[Message]:
        await asyncio.sleep(self.chance.random() / 100)
        return await super().reset(row)

    async def step(self, message: Message) -> StepResult:
        await asyncio.sleep(self.chance.random() / 100)
        return await super().step(message)


class Watching(ScriptedPolicy):
    """Keeps who asked, turn by turn."""

    asked: list[int]

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        self.asked.append(sampling.episode)
        return await super().generate(prompt_ids, sampling)


def test_a_turn_begins_for_all_at_once_and_in_their_order(codec: Any) -> None:
    engine = Watching(codec, SCRIPTS)
    engine.asked = []
    in_step = Lockstep(engine, len(ROWS))
    samplings = [Sampling(max_tokens=1, temperature=0.0)] * len(ROWS)
    make = in_step.attended(Delayed)
    finish(rollout_batch(ROWS, make, codec, in_step, limits=LIMITS, samplings=samplings))
    turns = [list(range(first, 6)) for first in range(6)]  # row i answers in turn i
    assert engine.asked == [episode for turn in turns for episode in turn]


def test_rows_are_played_in_the_order_of_their_ids(codec: Any) -> None:
    """Where a row stands in a batch can matter to a processor."""

    class Reading(ScriptedPolicy):
        async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
            read.append(self._key(self.codec.tokenizer.decode(list(prompt_ids))))
            return await super().generate(prompt_ids, sampling)

    read: list[str] = []
    metrics: dict[str, Any] = {"one": lambda trajectories: [1.0] * len(trajectories)}
    engine = Reading(codec, SCRIPTS)
    shuffled = random.Random(2).sample(ROWS, k=len(ROWS))
    scored = evaluate_rows(shuffled, GuessEnv, codec, engine, limits=LIMITS, metrics=metrics)
    assert read[: len(ROWS)] == [row["question"] for row in ROWS]
    assert [s.row_id for s in scored] == [row["id"] for row in shuffled]


def test_each_end_is_told_once(codec: Any) -> None:
    ended = []
    engine = ScriptedPolicy(codec, SCRIPTS)
    metrics: dict[str, Any] = {"one": lambda trajectories: [1.0] * len(trajectories)}
    evaluate_rows(
        ROWS,
        Delayed,
        codec,
        engine,
        limits=LIMITS,
        metrics=metrics,
        ended=lambda: ended.append(1),
    )
    assert len(ended) == len(ROWS)


def test_an_episode_that_fails_leaves_nobody_waiting(codec: Any) -> None:
    class Failing(Delayed):
        async def step(self, message: Message) -> StepResult:
            if self.secret == 3:
                raise ValueError("broken game")
            return await super().step(message)

    in_step = Lockstep(ScriptedPolicy(codec, SCRIPTS), len(ROWS))
    samplings = [Sampling(max_tokens=1, temperature=0.0)] * len(ROWS)
    make = in_step.attended(Failing)
    with pytest.raises(RuntimeError, match="row 'r3' failed: ValueError: broken game"):
        finish(rollout_batch(ROWS, make, codec, in_step, limits=LIMITS, samplings=samplings))


def tokens(played: Sequence[Trajectory]) -> list[Any]:
    """What was sampled and how likely it was, to the last bit."""
    return [[(turn.action_ids, turn.logprobs) for turn in t.turns] for t in played]


def play(codec: Any, engine: Engine, rows: Sequence[Row], temperature: float) -> list[Any]:
    metrics: dict[str, Any] = {"turns": lambda trajectories: [len(t.turns) for t in trajectories]}
    scored = evaluate_rows(
        rows,
        Delayed,
        codec,
        engine,
        limits=LIMITS,
        metrics=metrics,
        temperature=temperature,
    )
    return tokens([s.trajectory for s in scored])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neither_delays_nor_the_order_of_rows_change_a_bit_of_a_real_policys_answers(
    codec: Any, make_model: Callable[..., Any], temperature: float
) -> None:
    engine = InProcessEngine(make_model(), sorted(codec.stop_ids))
    before = play(codec, engine, ROWS, temperature)
    assert any(len(turns) > 2 for turns in before)
    shuffled = random.Random(1).sample(range(len(ROWS)), k=len(ROWS))
    again = play(codec, engine, [ROWS[i] for i in shuffled], temperature)
    assert again == [before[i] for i in shuffled]
    others = [{"id": f"x{i}", "secret": 4, "question": f"{i} Other. "} for i in range(3)]
    play(codec, engine, others, temperature)
    assert play(codec, engine, ROWS, temperature) == before
