"""Peak memory of one rollout and one update: `AgentTrainer` against `GRPOTrainer` with its tools.

Each side trains one step in a process of its own, on a random model of SmolLM2's shape that
follows the script of the other benchmarks; what counts is the process's maximum, as the operating
system saw it. Imports, weights, gradients and optimizer state are in it on both sides.

    python -m benchmarks.memory --json memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from agentr1.config import AgentConfig
from agentr1.envs.tool_env import ToolEnv
from agentr1.tools.base import tool
from agentr1.tools.runner import ToolRunner
from agentr1.trainer import AgentTrainer
from benchmarks import shapes, work
from benchmarks.comparison import finish, no_more
from benchmarks.script import forced

TARGET = 1.05
"""At most so many times TRL's peak."""
SIDES = ("ours", "theirs")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 where the target is missed."""
    options = _parser().parse_args(argv)
    work.quiet(options.threads)
    script = work.write(options)
    if options.side:
        _train(options.side, script, options)
        print(json.dumps({"peak_mib": _peak_mib()}))
        return 0
    peaks = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side in SIDES:
            peaks[side].append(_of_a_process(side, options))
    ours, theirs = (statistics.median(peaks[side]) for side in SIDES)
    workload = work.describe(script, options, "generate with sync tools") | {
        "policy": f"random weights of {options.shape}'s shape",
        "micro_batch": options.micro_batch,
    }
    line = no_more("peak memory", (ours, theirs), workload, TARGET, measure="MiB")
    return finish([line], options.json)


def _of_a_process(side: str, options: argparse.Namespace) -> float:
    """The peak of one side, in MiB."""
    told = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(options).items()
        if name not in ("side", "json", "repeats")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", f"--side={side}", *told],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the process of {side!r} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_mib"]


def _peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _train(side: str, script: work.Work, options: argparse.Namespace) -> None:
    """One step of one side."""
    played = script.script
    search = script.slow.of(0, script.slow.functions()[0])
    script.slow.takes([[0.0] * 10**6])
    script.slow.begin()
    rows = [
        {
            "question": row["question"],
            "prompt": [{"role": m.role, "content": m.content} for m in played.opening(row)],
        }
        for row in played.rows[:: played.group]
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "num_generations": played.group,
            "per_device_train_batch_size": options.micro_batch,
            "gradient_accumulation_steps": options.rollouts // options.micro_batch,
            "max_completion_length": 2 * len(played.completion_ids),
            "max_steps": 1,
        }
        common: dict[str, Any] = {
            "model": forced(shapes.random_model(options.shape), played),
            "reward_funcs": _unequal_reward,
            "train_dataset": Dataset.from_list(rows),
            "processing_class": script.tokenizer,
        }
        if side == "theirs":
            trainer = GRPOTrainer(args=GRPOConfig(**settings), tools=[search], **common)
        else:
            runner = ToolRunner([tool(search)])
            trainer = AgentTrainer(
                args=AgentConfig(trajectory_steps=0, **settings),
                env_factory=lambda: ToolEnv(runner, played.system_prompt),
                **common,
            )
        trainer.train()
        _check_played(trainer, played)


def _check_played(trainer: Any, script: Any) -> None:
    """Both sides must have sampled the whole script."""
    logged = next(line for line in trainer.state.log_history if "completions/mean_length" in line)
    if logged["completions/mean_length"] != len(script.policy_ids):
        raise RuntimeError(
            f"expected {len(script.policy_ids)} sampled tokens an episode, got "
            f"{logged['completions/mean_length']}"
        )


def _unequal_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """Another reward for every episode of a group."""
    return [float(i % 3) for i in range(len(completions))]


def _parser() -> argparse.ArgumentParser:
    parser = work.arguments("memory", "Compare the peak memory of one training step.", repeats=1)
    parser.set_defaults(rollouts=8, turns=2)
    parser.add_argument("--shape", choices=sorted(shapes.SHAPES), default="SmolLM2-135M")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--side", choices=SIDES, help="be one side; print its peak alone")
    return parser


if __name__ == "__main__":
    sys.exit(main())
