"""Real launches: two processes under DDP, ZeRO-2 and ZeRO-3, and a run that is killed.

What is started here is what a user types, `accelerate launch ... -m agentr1.train RECIPE`, on the
shipped data and policy.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    *("--per_device_train_batch_size", "8", "--num_generations", "4", "--max_turn_tokens", "32"),
    *("--test_limit", "6", "--dev_limit", "6", "--trajectory_steps", "1"),
)
LORA = ("--use_peft", "true", "--lora_r", "4", "--lora_dropout", "0")
ALL_LINEAR = ("--lora_target_modules", "all-linear")

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]


def environment() -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **quiet, "DS_ACCELERATOR": "cpu"}


def turns_of(path: Path) -> list[int]:
    return [len(json.loads(line)["turns"]) for line in path.read_text("utf-8").splitlines()]


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", ["cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_two_processes_train_with_uneven_turns(name: str, tmp_path: Path) -> None:
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
    folder = tmp_path / "run"
    command = [
        *launch,
        str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"),
        *("-m", "agentr1.train", "recipes/quickstart/grpo.yaml", "--output_dir", str(folder)),
        *("--max_steps", "2", "--eval_steps", "2", "--save_steps", "2"),
        *(*SMALL, *LORA, *ALL_LINEAR),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    turns = [turns_of(folder / "trajectories" / "step_000000.jsonl")]
    turns.append(turns_of(folder / "trajectories" / "step_000000.rank1.jsonl"))
    assert [len(rank) for rank in turns] == [8, 8]
    assert sum(turns[0]) != sum(turns[1]), f"both ranks took {turns}: no test of uneven turns"
    assert {int(line["step"]) for line in logged(folder) if "loss" in line} == {1, 2}
    assert (folder / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert (folder / "final" / "adapter_model.safetensors").is_file()
    assert json.loads((folder / "eval.json").read_text("utf-8"))["after"]["n"] == 6


def train(folder: Path, *options: str) -> Sequence[str]:
    steps = ("--max_steps", "8", "--eval_steps", "2", "--save_steps", "2")
    run = (sys.executable, "-m", "agentr1", "train", "quickstart", "--output_dir", str(folder))
    return [*run, *steps, *SMALL, *options]


def test_a_killed_run_resumes_and_does_each_step_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log = (tmp_path / "log").open("w")
    first = subprocess.Popen(train(folder), cwd=ROOT, env=environment(), stdout=log, stderr=log)
    deadline = time.monotonic() + 600
    while not list(folder.glob("checkpoint-4")) and time.monotonic() < deadline:
        assert first.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    log.close()
    before = (folder / "evaluation" / "before.jsonl").read_bytes()

    resumed = subprocess.run(
        train(folder, "--resume"), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stdout[-2000:] + resumed.stderr[-4000:]

    assert [line["step"] for line in logged(folder) if "loss" in line] == list(range(1, 9))
    assert (folder / "evaluation" / "before.jsonl").read_bytes() == before
    assert (folder / "final" / "model.safetensors").is_file()
    complete = {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
    for checkpoint in folder.glob("checkpoint-*"):
        assert complete <= {path.name for path in checkpoint.iterdir()}

    whole = tmp_path / "whole"
    subprocess.run(train(whole), cwd=ROOT, env=environment(), check=True, capture_output=True)
    compare = (sys.executable, "-m", "agentr1", "compare", str(folder), str(whole))
    shown = subprocess.run(compare, env=environment(), capture_output=True, text=True, check=True)
    assert "intervals overlap" in " ".join(shown.stdout.split())
