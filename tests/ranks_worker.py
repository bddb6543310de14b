"""One process of a launch in which the ranks take different numbers of turns; see test_ranks.py.

    accelerate launch --config_file FILE tests/ranks_worker.py POLICY OUT [SCENARIO ...]

Each optimizer step is a scenario. Everything is real (policy, engine, codec, tools, loss) but what
the environment hears: a plan stands for the policy's words, so that a test decides how many turns
an episode takes. Whatever is wrong is an AssertionError here; numbers go to OUT/rank0.json and
OUT/rank1.json.
"""

from __future__ import annotations

import asyncio
import dataclasses
import faulthandler
import itertools
import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from agentr1 import ToolPolicy, tool
from agentr1.envs.tool_env import ToolEnv
from agentr1.launch import launch_overrides, prepare_process
from agentr1.tools.runner import ToolRunner
from agentr1.trainer import AgentTrainer
from agentr1.types import Message, Row, StepResult, ToolResult, Trajectory
from trainers import make_trainer

SCENARIOS = (
    *("uneven", "swapped", "paid", "hanging", "faulted", "all_faulted", "mixed"),
    *("rewritten", "refilled"),
)
ROWS = [
    {"id": f"r{i}", "prompt": [{"role": "user", "content": f"What of r{i}?"}]} for i in range(16)
]
SILENT = tuple(f"r{i}" for i in range(12))
"""Rows whose rollouts are all paid alike in the scenario that refills."""
MOST_TURNS = 6
TIMEOUT = 1.0
"""Seconds until a hanging tool is given up."""


@tool
def lookup(key: str) -> str:
    """Look up.

    Args:
        key: what.
    """
    return f"{key} was found"


@tool
def paid(key: str) -> ToolResult:
    """Look up and be paid.

    Args:
        key: what.
    """
    return ToolResult(f"{key} was found", reward=1.0 + int(key[1:]))


@tool
async def hanging(key: str) -> str:
    """Never answer.

    Args:
        key: what.
    """
    await asyncio.sleep(3600)
    return key


@tool
def broken(key: str) -> str:
    """Fail.

    Args:
        key: what.
    """
    raise ConnectionError(f"no server for {key}")


def plan(scenario: str, rank: int, key: str, count: int) -> list[str]:
    """What the environment hears in an episode: names of tools, then an answer or the limit."""
    draws = random.Random(f"{scenario} {key} {count}")
    if scenario == "raising":  # an environment's bug on one rank, while the other plays on
        return ["lookup"] * 2 + (["answer"], ["raise"])[rank]
    if scenario == "uneven":
        return ["lookup"] * (rank * (MOST_TURNS - 1)) + ["answer"]
    if scenario == "swapped":
        return ["lookup"] * ((1 - rank) * (MOST_TURNS - 1)) + ["answer"]
    if scenario == "rewritten":  # one row an episode on rank 0, one a turn on rank 1
        return ["lookup"] * 3 + ["answer"]
    if scenario == "paid":  # turns are paid on one rank only: the other has plain advantages
        return [("lookup", "paid")[rank]] * (1 + count % 3) + ["answer"]
    if scenario == "hanging" and rank == 1:
        return ["hanging", "lookup", "answer"]
    if scenario == "all_faulted" or (scenario == "faulted" and rank == 0):
        return ["broken"] * MOST_TURNS
    return ["lookup"] * draws.randrange(MOST_TURNS - 1) + ["answer"]


class Planned(ToolEnv):
    """Acts on the plan of the current scenario; names the row in everything it says."""

    def __init__(self, runner: ToolRunner, here: Here) -> None:
        super().__init__(runner)
        self.here = here

    async def reset(self, row: Row) -> Sequence[Message]:
        self.key = row["id"]
        count = next(self.here.counts[self.key])
        self.plan = plan(self.here.scenario, self.here.rank, self.key, count)
        return await super().reset(row)

    async def step(self, message: Message) -> StepResult:
        name = self.plan.pop(0)
        if name == "raise":
            raise ZeroDivisionError("a bug of the environment")
        call = json.dumps({"name": name, "arguments": {"key": self.key}})
        said = name if name == "answer" else f"<tool_call>\n{call}\n</tool_call>"
        result = await super().step(dataclasses.replace(message, content=said, cut=False))
        # A number that one rank reports and the other has never heard of.
        seen = {"paid_calls": 1.0} if name == "paid" else {}
        if self.here.scenario == "rewritten" and self.here.rank == 1 and not result.terminated:
            again = (Message("user", f"What of {self.key}? {len(self.plan)} to go."),)
            result = dataclasses.replace(result, rewrite=again)
        return dataclasses.replace(result, info={**result.info, **seen})


class Here:
    """What this process knows of the scenario that is played."""

    def __init__(self, rank: int, scenarios: Sequence[str]) -> None:
        self.rank = rank
        self.scenarios = scenarios
        self.scenario = scenarios[0]
        self.counts: dict[str, Any] = defaultdict(itertools.count)
        self.found: dict[str, Any] = {
            name: {} for name in ("turns", "rewards", "seconds", "apart", "moved", "rows", "ids")
        }
        self.episodes: list[Trajectory] = []


def row_reward(trajectories: Sequence[Trajectory], id: Sequence[str], **_: object) -> list[float]:
    """Depends on the row and on what was sampled, so that a reward of another's is seen."""
    for trajectory, row_id in zip(trajectories, id, strict=True):
        assert trajectory.row["id"] == row_id
    return [outcome(t) for t in trajectories]


def outcome(trajectory: Trajectory) -> float:
    if Checking.here.scenario == "refilled" and trajectory.row["id"] in SILENT:
        return 1.0
    return float(trajectory.row["id"][1:]) * 100 + sum(trajectory.turns[0].action_ids) % 17


def ids_of(trajectory: Trajectory) -> tuple[int, ...]:
    return tuple(i for turn in trajectory.turns for i in (*turn.action_ids, *turn.observation_ids))


def expected_credit(trajectory: Trajectory, group: Sequence[Trajectory]) -> list[float]:
    """One advantage per turn, from the definitions: TRL's statistics, turns against the group."""
    rewards = torch.tensor([outcome(t) for t in group])
    own = (outcome(trajectory) - rewards.mean()) / (rewards.std() + 1e-4)
    credit = []
    for k in range(len(trajectory.turns)):
        to_go = [sum(t.process_rewards[k:]) for t in group]
        process = sum(trajectory.process_rewards[k:]) - sum(to_go) / len(to_go)
        credit.append(own.item() + process)
    return credit


class Checking(AgentTrainer):
    """Checks what arrives at the loss against what was played."""

    here: Here

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.here.scenario = self.here.scenarios[self.state.global_step]
        self.here.counts.clear()
        self._config.refill_rounds = 3 if self.here.scenario == "refilled" else 0
        start = time.monotonic()
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.here.episodes = list(self._episodes)
            played = [t.row["id"] for t in self.here.episodes]
            assert self.here.scenario == "refilled" or played == [row["id"] for row in inputs]
            found = {
                "turns": [len(t.turns) for t in self.here.episodes],
                "rewards": [outcome(t) for t in self.here.episodes],
                "seconds": time.monotonic() - start,
            }
            for name, value in found.items():
                self.here.found[name][self.here.scenario] = value
            self.here.found["rows"][self.here.scenario] = len(output["completion_ids"])
            self.here.found["ids"][self.here.scenario] = played
            for i, row_id in enumerate(played):
                self._check_row(output, i, row_id)
        return output

    def _check_row(self, batch: Any, i: int, expected_id: str | None = None) -> None:
        if self.here.scenario == "rewritten":  # rows are not episodes there
            return
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        asked = self.processing_class.decode(prompt)
        ids = tuple(batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist())
        (episode,) = {
            id(t): t
            for t in self.here.episodes
            if f"What of {t.row['id']}?" in asked and ids_of(t) == ids
        }.values()
        key = episode.row["id"]
        assert expected_id in (None, key)
        observed = self.processing_class.decode(ids)
        for other in ROWS:
            assert other["id"] == key or f"{other['id']} was" not in observed
        group = [t for t in self.here.episodes if t.row["id"] == key]
        self._check_credit(batch, i, episode, expected_credit(episode, group))

    def _check_credit(self, batch: Any, i: int, episode: Trajectory, credit: list[float]) -> None:
        wanted, trained = [], []
        for turn, value in zip(episode.turns, credit, strict=True):
            kept = turn.fault is None
            wanted += [value] * len(turn.action_ids) + [0.0] * len(turn.observation_ids)
            trained += [int(kept)] * len(turn.action_ids) + [0] * len(turn.observation_ids)
        mask = (batch["completion_mask"][i] * batch["tool_mask"][i])[: len(trained)]
        assert mask.tolist() == trained
        given = batch["advantages"][i]
        given = given.expand(len(wanted)) if given.ndim == 0 else given[: len(wanted)]
        kept = torch.tensor(trained).bool()
        torch.testing.assert_close(given[kept], torch.tensor(wanted)[kept], atol=1e-3, rtol=1e-3)

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        for i in range(len(inputs["completion_ids"])):
            self._check_row(inputs, i)
        loss = super()._compute_loss(model, inputs)
        assert torch.isfinite(loss)
        return loss


class SameWeights(TrainerCallback):
    """After every step: how far apart the ranks' weights are, and whether they moved."""

    def __init__(self, here: Here, trainer: Any) -> None:
        self.here, self.trainer = here, trainer
        self.before = flat_weights(trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = flat_weights(self.trainer)
        assert torch.isfinite(now).all()
        everyone = self.trainer.accelerator.gather(now[None])
        assert len(everyone) == 2
        scenario = self.here.scenarios[state.global_step - 1]
        self.here.found["apart"][scenario] = (everyone[0] - everyone[1]).abs().max().item()
        self.here.found["moved"][scenario] = (now - self.before).abs().max().item()
        self.before = now


def flat_weights(trainer: Any) -> torch.Tensor:
    parameters = list(trainer.model.parameters())
    if trainer.is_deepspeed_enabled and hasattr(parameters[0], "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return torch.cat([p.detach().float().flatten() for p in parameters])
    return torch.cat([p.detach().float().flatten() for p in parameters])


def evaluate(trainer: Any, here: Here) -> None:
    """Rows that do not divide by the ranks, fewer rows than ranks, and none at all."""
    here.scenario = "mixed"
    for count in (5, 1, 0):
        rows = ROWS[3 : 3 + count]
        played = trainer.play_greedily(rows)
        assert [s.row_id for s in played] == [row["id"] for row in rows]
        for scored in played:
            first = scored.trajectory.turns[0]
            asked = trainer.processing_class.decode(list(first.prompt_ids))
            assert f"What of {scored.row_id}?" in asked
    here.found["evaluations"] = [
        {k: v for k, v in record.items() if k.startswith("eval")}
        for record in trainer.state.log_history
        if "eval_turns" in record
    ]
    here.found["logged"] = [
        record for record in trainer.state.log_history if "rollout/turns" in record
    ]


def main(policy: str, out: Path, *scenarios: str) -> None:
    faulthandler.dump_traceback_later(80)  # a launch that hangs says where
    prepare_process()
    words = launch_overrides()
    launch = dict(zip((w.removeprefix("--") for w in words[::2]), words[1::2], strict=True))
    launch = {k: v == "true" if v in ("true", "false") else v for k, v in launch.items()}
    here = Here(int(os.environ["RANK"]), scenarios or SCENARIOS)
    runner = ToolRunner([lookup, paid, hanging, broken], default_policy=ToolPolicy(timeout=TIMEOUT))
    Checking.here = here
    trainer = make_trainer(
        out,
        policy,
        AutoTokenizer.from_pretrained(policy),
        trainer=Checking,
        rewards=row_reward,
        rows=ROWS,
        settings={
            "use_cpu": True,
            "max_steps": len(here.scenarios),
            "max_turns": MOST_TURNS,
            "max_completion_length": 512,
            "max_fault_share": 1.0,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 3,
            **launch,
        },
        env_factory=lambda: Planned(runner, here),
        eval_dataset=Dataset.from_list(ROWS[:3]),
    )
    trainer.add_callback(SameWeights(here, trainer))
    trainer.train()
    evaluate(trainer, here)
    (out / f"rank{here.rank}.json").write_text(json.dumps(here.found))
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
