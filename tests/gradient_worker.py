"""One process of a launch that takes one step with each algorithm; see test_gradients.py.

accelerate launch --config_file FILE tests/gradient_worker.py POLICY OUT
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from transformers import AutoTokenizer

from agentr1.actor_critic import ActorCriticTrainer
from agentr1.algorithms import ALGORITHMS
from agentr1.launch import launch_overrides, prepare_process
from agentr1.ranks import leave_processes
from agentr1.trainer import AgentTrainer
from agentr1.types import Message, Row, StopReason, Trajectory, Turn
from critic_worker import part_of
from trainers import make_trainer, planned

WAYS = {
    **{name: {"algorithm": name} for name, row in ALGORITHMS.items() if not row.needs_critic},
    "cut": {"algorithm": "grpo", "beta": 0.2},
    "cut, constant normaliser": {"algorithm": "turn_loo"},
    "ppo": {"algorithm": "ppo", "critic": "separate"},
    "steppo": {"algorithm": "steppo", "critic": "separate"},
    "cut, critic": {"algorithm": "ppo", "critic": "shared"},
}
"""Name to settings. In the ways that are called cut, contexts are rewritten."""

GROUPS, SIZE = 4, 2
ROWS = [
    {"id": f"r{i}", "prompt": [{"role": "user", "content": f"Question {i}?"}]}
    for i in range(GROUPS)
]


def episode(row: Row, member: int, cut: bool) -> Trajectory:
    """The same episode of a row's group wherever it is played."""
    draws = random.Random(f"{row['id']} {member}")

    def ids(most: int) -> tuple[int, ...]:
        return tuple(draws.randrange(20, 200) for _ in range(draws.randrange(1, most)))

    turns, context = [], ids(9)
    for k in range(draws.randrange(1, 4)):
        opens = k == 0 or (cut and draws.random() < 0.6)
        turn = _turn(draws, ids, context if opens else None, k)
        turns.append(turn)
        context = (*context, *turn.action_ids, *turn.observation_ids)
    return Trajectory(row, (), tuple(turns), StopReason.ENVIRONMENT)


def _turn(draws: random.Random, ids: Any, prompt: tuple[int, ...] | None, k: int) -> Turn:
    action = ids(7)
    return Turn(
        action_ids=action,
        logprobs=(-1.0,) * len(action),
        message=Message("assistant", "said"),
        observation_ids=ids(7),
        prompt_ids=prompt,
        reward=draws.choice([0.0, 0.5, 1.0]),
        anchor=draws.choice(["a", "b"]) if k else "",
    )


def reward(trajectories: Sequence[Trajectory], **_: object) -> list[float]:
    return [float(sum(t.turns[0].action_ids) % 5) for t in trajectories]


def step(
    folder: Path, policy: str, name: str, reverse: bool = False, **settings: Any
) -> dict[str, torch.Tensor]:
    """Weights after one step of plain gradient descent, less those before it, by part."""
    critic = ALGORITHMS[WAYS[name]["algorithm"]].needs_critic
    trainer = make_trainer(
        folder,
        policy,
        AutoTokenizer.from_pretrained(policy),
        trainer=ActorCriticTrainer if critic else AgentTrainer,
        rewards=reward,
        rows=ROWS,
        env_factory=planned([0.0]),
        settings={
            **WAYS[name],
            **settings,
            "optim": "sgd",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1e9,
            "max_steps": 1,
            "refill_rounds": 0,
            "max_completion_length": 48,
            "num_generations": SIZE,
            "shuffle_dataset": False,
        },
    )

    def play(rows: Sequence[Row]) -> list[Trajectory]:
        return [episode(dict(row), i % SIZE, "cut" in name) for i, row in enumerate(rows)]

    trainer._play_training = play
    prepare = trainer._prepare_inputs

    def prepared(batch: Any) -> Any:
        inputs = prepare(batch)
        if reverse and trainer._step == 0:  # the micro-batches of the window in another order
            trainer._buffered_inputs = trainer._buffered_inputs[::-1]
            return trainer._buffered_inputs[0]
        return inputs

    trainer._prepare_inputs = prepared
    if critic:  # at its first weights, 0, a critic's trunk has no gradient
        head = trainer.model.value_head.weight
        torch.nn.init.normal_(head, std=0.3, generator=torch.Generator().manual_seed(0))
    before = flat(trainer.model)
    trainer.train()
    after = flat(trainer.accelerator.unwrap_model(trainer.model))
    return {part: after[part] - weights for part, weights in before.items()}


def flat(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the weights: the policy's, and those of each part of the critic."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, p in model.named_parameters():
        found.setdefault(part_of(name), []).append(p.detach().flatten().clone())
    return {part: torch.cat(tensors) for part, tensors in found.items()}


def main(policy: str, out: Path) -> None:
    prepare_process()
    words = launch_overrides()
    launch: dict[str, Any] = {words[0].removeprefix("--"): words[1] == "true"}
    found = {}
    for name in WAYS:
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **launch}
        found[name] = step(out, policy, name, **settings)
    if PartialState().is_main_process:
        torch.save(found, out / "gradients.pt")
    leave_processes(Accelerator())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
