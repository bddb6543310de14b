"""One process of a launch that goes back to a checkpoint in its middle; see test_guard_ranks.py.

    accelerate launch --config_file FILE tests/guard_worker.py POLICY OUT KIND

KIND: `full`, or `critic` (an adapter with a critic beside it). The episodes of the ranks differ in
length. Numbers go to OUT/rank0.json and OUT/rank1.json.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

from agentr1.actor_critic import ActorCriticTrainer
from agentr1.collapse import Alarm
from agentr1.engines.base import Sampling
from agentr1.launch import launch_overrides, prepare_process
from agentr1.trainer import AgentTrainer
from agentr1.types import Row, Trajectory
from critic_worker import whole_weights
from ranks_worker import ROWS
from trainers import make_trainer, planned

PLANS = (([1.0, 0.0, 2.0], [0.5], [0.0, 1.0], [0.0]), ([0.0], [1.0], [0.5], [0.0]))
STEPS, SAVED, ALARM = 6, 3, 4
"""Of the run; the step that is saved; and the one before whose rollout the alarm is answered."""


class Watched(AgentTrainer):
    """Keeps the weights that each rollout samples from."""

    def _play(
        self, rows: Sequence[Row], samplings: Sequence[Sampling], spare: int = 0
    ) -> list[Trajectory]:
        self.found["sampled"].append(numbers(self))
        return super()._play(rows, samplings, spare)

    found: dict[str, Any]


class WatchedWithCritic(Watched, ActorCriticTrainer):
    """The same beside a critic."""


class AlarmOnce(TrainerCallback):
    """An alarm on every process, as all of them read the same record."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == ALARM:
            guard = self.trainer._guard
            guard._alarm = Alarm("entropy", 0.0, 1.0, "given by the test")
            guard._seen += 100  # whatever was saved before is old

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.found["stepped"].append(numbers(self.trainer))


def numbers(trainer: Any) -> dict[str, list[float]]:
    return {part: weights.tolist() for part, weights in whole_weights(trainer).items()}


def main(policy: str, out: Path, kind: str) -> None:
    faulthandler.dump_traceback_later(80)  # a launch that hangs says where
    prepare_process()
    words = launch_overrides()
    launch = dict(zip((w.removeprefix("--") for w in words[::2]), words[1::2], strict=True))
    launch = {k: v == "true" if v in ("true", "false") else v for k, v in launch.items()}
    rank = int(os.environ["RANK"])
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    trainer = make_trainer(
        out,
        policy,
        AutoTokenizer.from_pretrained(policy),
        trainer=WatchedWithCritic if kind == "critic" else Watched,
        rows=ROWS,
        settings={
            "algorithm": "ppo" if kind == "critic" else None,
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "lr_scheduler_type": "constant",
            "collapse_guard": "roll_back",
            "save_strategy": "steps",
            "save_steps": SAVED,
            **launch,
        },
        peft_config=lora if kind == "critic" else None,
        env_factory=planned(*PLANS[rank]),
    )
    trainer.found = {"sampled": [], "stepped": []}
    trainer.add_callback(AlarmOnce(trainer))
    trainer.train()
    trainer.found["rates"] = [
        record["learning_rate"] for record in trainer.state.log_history if "reward" in record
    ]
    (out / f"rank{rank}.json").write_text(json.dumps(trainer.found))
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
