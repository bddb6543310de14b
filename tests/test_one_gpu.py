"""A process trains on one GPU: `make` shows it one, and a command that sees several is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from agentr1 import sft, train

ROOT = Path(__file__).resolve().parents[1]
MAINS = {"train": train.main, "sft": sft.main}
RECIPES = {"train": "quickstart", "sft": "quickstart/sft"}

OURS = ("CUDA_VISIBLE_DEVICES", "RECIPE", "ACCELERATE", "LAUNCH_ARGS", "ARGS", "MAKEFLAGS")
"""What the tests set, or what the `make` that runs them would hand on."""

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., str]:
    """Run a target with a Python that says which GPUs it is shown, and what it is to do."""
    python, installed = tmp_path / "python", tmp_path / "installed"
    python.write_text('#!/bin/sh\necho "[${CUDA_VISIBLE_DEVICES-all}] $*"\n')
    python.chmod(0o755)
    installed.touch()

    def run(*words: str, shown: str | None = None) -> str:
        kept = {k: v for k, v in os.environ.items() if k not in OURS}
        given = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
        set_up = [f"PY={python}", f"INSTALLED={installed}", f"SMOLLM2={installed}"]
        command = ["make", "-s", "-C", str(ROOT), *set_up, *words]
        done = subprocess.run(command, env=kept | given, capture_output=True, text=True, check=True)
        return next(line for line in done.stdout.splitlines() if line.startswith("["))

    return run


@needs_make
@pytest.mark.parametrize(
    "target",
    ["train", "sft", "eval", "play", "ablate", "algorithms", "results", "bench", "coldstart"],
)
def test_make_shows_one_gpu_to_what_no_launcher_starts(
    make: Callable[..., str], target: str
) -> None:
    assert make(target).startswith("[0] ")
    assert make(target, shown="3").startswith("[3] ")
    assert make(target, shown="").startswith("[] "), "empty means no GPU"


@needs_make
@pytest.mark.parametrize("target", ["train", "sft"])
@pytest.mark.parametrize(
    ("configuration", "shown"),
    [("single", "0"), ("ddp", "all"), ("zero2", "all"), ("zero3", "all"), ("cpu_ddp", "")],
)
def test_make_leaves_the_gpus_to_the_launcher_it_is_told_to_use(
    make: Callable[..., str], target: str, configuration: str, shown: str
) -> None:
    file = f"recipes/accelerate/{configuration}.yaml"
    assert make(target, f"ACCELERATE={configuration}") == (
        f"[{shown}] -m accelerate.commands.launch --config_file {file} -m agentr1.{target} "
        f"{RECIPES[target]}"
    )


@needs_make
def test_the_papers_recipes_go_through_the_launcher_with_one_gpu(make: Callable[..., str]) -> None:
    assert make("train", "RECIPE=hotpot").startswith("[0] -m accelerate.commands.launch ")
    assert make("train", "RECIPE=hotpot", "ACCELERATE=") == "[0] -m agentr1 train hotpot"


@pytest.mark.parametrize("verb", MAINS)
def test_several_gpus_are_refused_before_anything_is_loaded(
    verb: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    out = ["--output_dir", str(tmp_path / "run")]
    assert MAINS[verb]([RECIPES[verb], *out]) == 2
    error = capsys.readouterr().err
    assert "this one sees 2" in error
    assert "CUDA_VISIBLE_DEVICES=0" in error
    assert "recipes/accelerate/ddp.yaml" in error
    assert not (tmp_path / "run").exists()


def test_on_a_cpu_it_does_not_matter_how_many_gpus_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train.main(["quickstart", "--dry-run", "--use_cpu", "true"]) == 0
    assert "everything resolves" in capsys.readouterr().out
