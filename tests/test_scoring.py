"""Evaluation: greedy, keyed by row, the same numbers whatever the order."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agentr1.engines.base import Generation, Sampling
from agentr1.rollout import Limits
from agentr1.scoring import Scored, episode_means, evaluate_rows, score, summary
from agentr1.types import Message, StopReason, Trajectory, Turn
from fakes import GuessEnv, ScriptedPolicy

ROWS = [{"id": f"r{i}", "secret": i, "question": f"Game {i}. "} for i in range(4)]
SCRIPTS = {
    "Game 0. ": ["5", "2", "0"],
    "Game 1. ": ["1"],
    "Game 2. ": ["none", "2"],
    "Game 3. ": ["5", "4", "6", "7"],
}
LIMITS = Limits(max_turns=4, max_completion_length=400)


def turns_taken(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
    return [float(len(t.turns)) for t in trajectories]


def found(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
    return [float(t.stop_reason.is_terminal) for t in trajectories]


METRICS: dict[str, Callable[..., Any]] = {"found": found, "turns_taken": turns_taken}


def evaluate(codec: Any, rows: Sequence[dict[str, Any]]) -> list[Scored]:
    engine = ScriptedPolicy(codec, SCRIPTS)
    return evaluate_rows(rows, GuessEnv, codec, engine, limits=LIMITS, metrics=METRICS)


def test_every_row_is_played_once_and_scored_by_every_metric(codec: Any) -> None:
    scored = evaluate(codec, ROWS)
    assert [s.row_id for s in scored] == ["r0", "r1", "r2", "r3"]
    assert [dict(s.values) for s in scored] == [
        {"found": 1.0, "turns_taken": 3.0},
        {"found": 1.0, "turns_taken": 1.0},
        {"found": 1.0, "turns_taken": 2.0},
        {"found": 0.0, "turns_taken": 4.0},
    ]


def test_the_order_of_rows_changes_no_score(codec: Any) -> None:
    shuffled = random.Random(0).sample(ROWS, k=len(ROWS))
    by_id = {s.row_id: s.values for s in evaluate(codec, shuffled)}
    assert by_id == {s.row_id: s.values for s in evaluate(codec, ROWS)}


def test_evaluation_is_greedy(codec: Any) -> None:
    temperatures = set()

    class Watching(ScriptedPolicy):
        async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
            temperatures.add(sampling.temperature)
            return await super().generate(prompt_ids, sampling)

    engine = Watching(codec, SCRIPTS)
    evaluate_rows(ROWS, GuessEnv, codec, engine, limits=LIMITS, metrics=METRICS)
    assert temperatures == {0.0}


def test_a_rows_draws_depend_on_its_id_alone(codec: Any) -> None:
    def seeds(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
        found = {}

        class Watching(ScriptedPolicy):
            async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
                key = self._key(self.codec.tokenizer.decode(list(prompt_ids)))
                found.setdefault(key, sampling.seed)
                return await super().generate(prompt_ids, sampling)

        engine = Watching(codec, SCRIPTS)
        evaluate_rows(
            rows, GuessEnv, codec, engine, limits=LIMITS, metrics=METRICS, temperature=1.0
        )
        return found

    alone, together = seeds(ROWS[2:3]), seeds(ROWS)
    assert alone == {"Game 2. ": together["Game 2. "]}
    assert len(set(together.values())) == len(ROWS)


def test_the_summary_has_means_intervals_and_how_episodes_went(codec: Any) -> None:
    found_ = summary(evaluate(codec, ROWS))
    assert found_["found"] == 0.75
    assert found_["turns_taken"] == 2.5
    assert found_["n"] == 4
    assert found_["turns"] == 2.5
    assert found_["truncated"] == 0.25
    assert found_["stop_reasons"] == {"environment": 3, "max_turns": 1}
    assert found_["ci95"] == found_["intervals"]["found"]
    low, high = found_["intervals"]["turns_taken"]
    assert 1.0 <= low <= 2.5 <= high <= 4.0


def test_the_summary_of_nothing_is_empty() -> None:
    assert summary([])["n"] == 0


def test_a_row_without_an_id_goes_by_its_position() -> None:
    trajectories = [_episode({}), _episode({"id": 7})]
    assert [s.row_id for s in score(trajectories, {})] == ["0", "7"]


def test_episode_means_add_up_turns_and_whatever_environments_report() -> None:
    short = _episode({}, infos=[{"calls": 1.0}], rewards=[0.5])
    long = _episode({}, infos=[{"calls": 2.0}, {"cut": 1.0}], rewards=[1.0, -0.5])
    assert episode_means([short, long]) == {
        "turns": 1.5,
        "truncated": 0.0,
        "process_reward": 0.5,
        "calls": 1.5,
        "cut": 0.5,
    }
    assert episode_means([]) == {}


@pytest.mark.parametrize("value", [1, True, 0.25])
def test_a_metric_may_give_any_number(value: float) -> None:
    (record,) = score([_episode({})], {"m": lambda trajectories: [value]})
    assert record.values["m"] == float(value)


def _episode(
    row: dict[str, Any],
    infos: Sequence[dict[str, float]] = ({},),
    rewards: Sequence[float] = (0.0,),
) -> Trajectory:
    turns = tuple(
        Turn((2,), (-1.0,), Message("assistant", ""), prompt_ids=(1,), info=info, reward=reward)
        for info, reward in zip(infos, rewards, strict=True)
    )
    return Trajectory(row, (Message("user", "?"),), turns, StopReason.ENVIRONMENT)


def test_tokens_seconds_and_faults_are_counted() -> None:
    turns = (
        Turn((1, 2, 3), (0.0,) * 3, Message("assistant", "a"), (4, 5), (7, 8, 9), fault="down"),
        Turn((1,), (0.0,), Message("assistant", "b"), info={"calls": 1.0}),
        Turn((1, 2), (0.0,) * 2, Message("assistant", "c"), (), (7,)),  # the context was rewritten
    )
    played = [
        Trajectory({"id": "a"}, (), turns, StopReason.ENVIRONMENT, seconds=4.0),
        Trajectory({"id": "b"}, (), turns[1:2], StopReason.MAX_TURNS, seconds=1.0),
    ]
    scored = [
        dataclasses.replace(s, wall_seconds=3.0)
        for s in score(played, {"turns_taken": turns_taken})
    ]
    found_ = summary(scored)
    assert found_["prompt_tokens"] == (3 + 1 + 0) / 2
    assert found_["generated_tokens"] == (3 + 1 + 2 + 1) / 2
    assert found_["observation_tokens"] == 2 / 2
    assert found_["calls"] == 1.0
    assert found_["fault_share"] == 1 / 4
    assert (found_["seconds"], found_["seconds_median"]) == (2.5, 2.5)
    assert found_["wall_seconds"] == 6.0
    assert "faulty_turns" not in found_
