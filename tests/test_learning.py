"""Every algorithm learns a two-turn game that cannot be won without reading the observation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentr1.actor_critic import ActorCriticTrainer
from agentr1.algorithms import ALGORITHMS
from agentr1.trainer import AgentTrainer
from agentr1.types import Message, StepResult, Trajectory
from fakes import GuessEnv
from trainers import make_trainer, silent_reward, taught

# Whoever guesses at random finds one secret of three in two turns with probability 5/9; 1 first
# and then what the hint says finds all.
PROMPT = [{"role": "user", "content": "Play."}]  # TRL wants one; the game opens its own way
ROWS = [{"id": str(i), "secret": i % 3, "prompt": PROMPT} for i in range(96)]
LEARNED = 0.85
SETTINGS = {
    "max_turns": 2,
    "max_turn_tokens": 2,
    "max_completion_length": 96,
    "per_device_train_batch_size": 96,
    "num_generations": 8,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 40,
    "beta": 0.0,
}


RATIO = ("dapo", "gspo", "cispo", "sapo", "ppo", "steppo")
"""Algorithms whose idea is the ratio: with one update a batch it would always be 1."""
CLIPPED = ("clip_ratio/region_mean", "cispo_clip_ratio")
"""Where TRL logs the share of clipped tokens; sapo has a gate in the clip's place."""
TIGHT = {"cispo": {"epsilon_high": 1.2}}
"""At its own bound, a ratio of 5, it clips next to nothing of so short a game."""


class OutcomeOnly(GuessEnv):
    """The game without its payments for single turns, lost with the second wrong guess.

    The environment says so itself: behind a limit of the rollout a critic would look for what
    comes next.
    """

    guesses = 0

    async def step(self, message: Message) -> StepResult:
        result = await super().step(message)
        self.guesses += 1
        if not result.terminated and self.guesses < SETTINGS["max_turns"]:
            return StepResult(result.observation)
        return StepResult(terminated=True, info={"won": float(result.terminated)})


def won(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
    return [t.turns[-1].info.get("won", 0.0) for t in trajectories]


def found(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
    return [float(t.stop_reason.is_terminal) for t in trajectories]


@pytest.fixture(scope="module")
def guesser(make_model: Callable[..., Any], tokenizer: Any) -> Any:
    """A policy that answers with one of the digits 0 to 2, whatever it is told."""
    draw = random.Random(0)
    question = {"role": "user", "content": "Guess a number from 0 to 9."}

    def conversation() -> list[dict[str, str]]:
        first, second = ({"role": "assistant", "content": draw.choice("012")} for _ in range(2))
        hint = {"role": "user", "content": draw.choice(["higher", "lower"])}
        return [question, first, hint, second]

    return taught(make_model(), tokenizer, conversation)


def losses_by_batch(trainer: Any) -> list[list[float]]:
    """Filled in training: the losses of each generation batch, in the order of its updates."""
    found: list[list[float]] = []
    kept: list[Any] = []  # the tensors that tell batches apart
    compute_loss = trainer._compute_loss

    def recorded(model: Any, inputs: Any) -> Any:
        loss = compute_loss(model, inputs)
        if not kept or kept[-1] is not inputs["completion_ids"]:
            kept.append(inputs["completion_ids"])
            found.append([])
        found[-1].append(loss.item())
        return loss

    trainer._compute_loss = recorded
    return found


def rewards_of(trainer: Any, name: str) -> list[float]:
    trainer.train()
    return [record[name] for record in trainer.state.log_history if name in record]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_an_algorithm_learns_to_read_the_observation(
    tmp_path: Path, guesser: Any, tokenizer: Any, algorithm: str
) -> None:
    updates = {"num_iterations": 2, "max_steps": 80} if algorithm in RATIO else {}
    updates |= TIGHT.get(algorithm, {})
    trainer = make_trainer(
        tmp_path,
        guesser,
        tokenizer,
        trainer=ActorCriticTrainer if ALGORITHMS[algorithm].needs_critic else AgentTrainer,
        rewards=won,
        rows=ROWS,
        settings=SETTINGS | updates | {"algorithm": algorithm},
        env_factory=OutcomeOnly,
    )
    losses = losses_by_batch(trainer)
    rewards = rewards_of(trainer, "reward")
    if algorithm in RATIO:  # the second update of a batch meets another policy than the first
        assert {len(each) for each in losses} == {2}
        assert losses[0][0] != losses[0][1]
        history = trainer.state.log_history
        clipped = [record[key] for record in history for key in CLIPPED if key in record]
        assert max(clipped, default=0) > 0 or algorithm == "sapo"
    assert rewards[0] < 0.7  # before any update
    assert sum(rewards[-5:]) / 5 > LEARNED


@pytest.mark.slow
def test_process_rewards_alone_teach_it_too(tmp_path: Path, guesser: Any, tokenizer: Any) -> None:
    trainer = make_trainer(
        tmp_path,
        guesser,
        tokenizer,
        rewards=silent_reward,
        rows=ROWS,
        settings=SETTINGS | {"algorithm": "rloo"},
        env_factory=GuessEnv,
        metrics={"found": found},
    )
    successes = rewards_of(trainer, "rollout/found")
    assert successes[0] < 0.7
    assert sum(successes[-5:]) / 5 > LEARNED
