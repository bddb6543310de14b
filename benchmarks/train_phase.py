"""The update on completions of heavy-tailed length: `AgentTrainer` against TRL's `GRPOTrainer`.

Both sides get the same generation batch: random tokens in turns of actions and observations, most
episodes short and a few long. Timed is one accumulation window of micro-batches, loss and
backward; the batch is made outside the clock. First, both must have the same loss and gradients.

    python -m benchmarks.train_phase --json train_phase.json
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from agentr1.config import AgentConfig
from agentr1.envs.tool_env import ToolEnv
from agentr1.segments import flatten
from agentr1.tools.runner import ToolRunner
from agentr1.trainer import AgentTrainer
from agentr1.types import Message, StopReason, Trajectory, Turn
from benchmarks import comparison, work
from benchmarks.comparison import faster, finish, medians

TARGET = 1.4
"""The least ratio to TRL."""
TOLERANCE = 1e-5
"""Of the loss, and of the gradients relative to their norm."""
PROMPT, ACTION, OBSERVATION = 30, 18, 54
"""Tokens, as in the quickstart."""
MEDIAN_TURNS, SPREAD = 2.5, 0.75
"""Turns are log-normal: the 99th percentile is six times the median."""


def draw_episodes(count: int, most_turns: int, vocabulary: int, seed: int = 0) -> list[Trajectory]:
    """Trajectories of random tokens; the last turn answers, the others are answered."""
    uniform = random.Random(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(uniform.randrange(3, vocabulary) for _ in range(length))

    episodes = []
    for _ in range(count):
        drawn = MEDIAN_TURNS * 2.718281828 ** (SPREAD * uniform.gauss())
        length = min(most_turns, max(1, round(drawn)))
        turns = [
            Turn(
                action_ids=tokens(ACTION),
                logprobs=(-1.0,) * ACTION,
                message=Message("assistant", ""),
                observation_ids=tokens(OBSERVATION) if k < length - 1 else (),
                prompt_ids=tokens(PROMPT) if k == 0 else None,
            )
            for k in range(length)
        ]
        episodes.append(Trajectory({}, (), tuple(turns), StopReason.ENVIRONMENT))
    return episodes


class Replaying(AgentTrainer):
    """Plays no episode: the drawn ones are its rollouts."""

    episodes: Sequence[Trajectory] = ()

    def _play(self, rows: Any, *_: Any, **__: Any) -> list[Trajectory]:
        pairs = zip(self.episodes, rows, strict=True)
        return [dataclasses.replace(episode, row=row) for episode, row in pairs]


class Side:
    """One trainer, and what its window costs."""

    def __init__(self, trainer: Any, rows: Sequence[dict[str, Any]]) -> None:
        self.trainer, self.rows = trainer, [dict(row) for row in rows]
        self.trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        self.trainer.model.train()
        self._made = trainer._generate_and_score_completions
        self._making = 0.0
        trainer._generate_and_score_completions = self._make

    def _make(self, inputs: Any) -> Any:
        start = time.perf_counter()
        made = self._made(inputs)
        self._making += time.perf_counter() - start
        return made

    def window(self) -> tuple[float, float]:
        """Accumulate the gradients of one window; the seconds without the batch, and the loss."""
        self.trainer.model.zero_grad()
        torch.manual_seed(0)  # TRL shuffles the rows
        self._making = 0.0
        start = time.perf_counter()
        losses = [
            self.trainer.training_step(self.trainer.model, self.rows, None)
            for _ in range(self.trainer.args.gradient_accumulation_steps)
        ]
        took = time.perf_counter() - start - self._making
        return took, float(torch.stack(losses).sum())

    def seconds(self) -> float:
        """Seconds of one window."""
        return self.window()[0]

    def gradients(self) -> torch.Tensor:
        """All of them in one row."""
        found = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        return torch.cat([gradient.flatten() for gradient in found])


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    episodes: Sequence[Trajectory],
    micro_batch: int,
    folder: str,
) -> tuple[Side, Side]:
    """Ours and TRL's on copies of one model."""
    length = max(len(flatten(episode)[0].completion_ids) for episode in episodes)
    settings: dict[str, Any] = {
        "use_cpu": model.device.type == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "num_generations": 4,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": len(episodes) // micro_batch,
        "max_completion_length": length,
    }
    rows = [
        {"id": str(i // 4), "prompt": [{"role": "user", "content": f"Question {i // 4}?"}]}
        for i in range(len(episodes))
    ]
    common: dict[str, Any] = {
        "reward_funcs": _unequal_reward,
        "train_dataset": Dataset.from_list(rows),
    }

    def replay(prompts: Any, trainer: Any) -> dict[str, Any]:
        segments = [flatten(episode)[0] for episode in episodes]
        return {
            "prompt_ids": [list(s.prompt_ids) for s in segments],
            "completion_ids": [list(s.completion_ids) for s in segments],
            "logprobs": [list(s.logprobs) for s in segments],
            "env_mask": [list(s.loss_mask) for s in segments],
        }

    ours = Replaying(
        model=copy.deepcopy(model),
        args=AgentConfig(f"{folder}/ours", trajectory_steps=0, **settings),
        processing_class=copy.deepcopy(tokenizer),
        env_factory=lambda: ToolEnv(ToolRunner([])),
        **common,
    )
    ours.episodes = episodes
    theirs = GRPOTrainer(
        model=copy.deepcopy(model),
        args=GRPOConfig(f"{folder}/theirs", **settings),
        processing_class=copy.deepcopy(tokenizer),
        rollout_func=replay,
        **common,
    )
    return Side(ours, rows), Side(theirs, rows)


def check_equal(ours: Side, theirs: Side) -> dict[str, float]:
    """Refuse to time updates that differ; the differences."""
    (_, loss), (_, other) = ours.window(), theirs.window()
    mine, yours = ours.gradients(), theirs.gradients()
    found = {
        "loss_difference": abs(loss - other),
        "gradient_difference": float((mine - yours).norm() / yours.norm()),
    }
    if not yours.norm() > 0 or max(found.values()) > TOLERANCE:
        raise RuntimeError(f"both sides must update alike, got {found}, losses {loss} and {other}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 where the target is missed."""
    parser = comparison.arguments("train_phase", "Time loss and backward on unequal lengths.")
    parser.add_argument("--policy", default=work.QUICKSTART, help="a model's folder, or its Hub id")
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--most-turns", type=int, default=12)
    options = parser.parse_args(argv)
    work.quiet(options.threads)
    model, tokenizer = work.model_of(options.policy), work.tokenizer_of(options.policy)
    episodes = draw_episodes(options.episodes, options.most_turns, len(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = build(model, tokenizer, episodes, options.micro_batch, folder)
        differences = check_equal(ours, theirs)
        took = medians(ours.seconds, theirs.seconds, repeats=options.repeats)
    lengths = sorted(len(flatten(episode)[0].completion_ids) for episode in episodes)
    workload = {
        "episodes": options.episodes,
        "micro_batch": options.micro_batch,
        "completion_tokens": lengths,
        "trained_tokens": sum(sum(flatten(episode)[0].loss_mask) for episode in episodes),
        "repeats": options.repeats,
        "policy": options.policy,
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "theirs": f"TRL {version('trl')}",
        **differences,
    }
    padded = f"median {lengths[len(lengths) // 2]} tokens, longest {lengths[-1]}"
    name = f"train phase, {work.short_name(options.policy)}"
    return finish([faster(name, (took[0], took[1]), workload, TARGET, padded)], options.json)


def _unequal_reward(completion_ids: Sequence[Any], **_: Any) -> list[float]:
    """Another reward for every episode of a group."""
    return [float((7 * i) % 5) for i in range(len(completion_ids))]


if __name__ == "__main__":
    sys.exit(main())
