"""What a command that trains makes sure of before the first step: its processes, their folder.

The launcher is `accelerate launch`, or nothing: then there is one process. Knows neither tasks nor
policies.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.utils.logging import disable_progress_bar

from agentr1.recipe import Recipe
from agentr1.runs import new_run_folder, newest_resumable

DEFAULT_OUTPUT = "trainer_output"
"""TRL's default output folder, which means here: make one under `runs/`."""


def prepare_process() -> None:
    """Silence libraries' own bars, and tell DeepSpeed what it would warn about finding out."""
    disable_progress_bar()
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def launch_overrides() -> list[str]:
    """What several processes without a GPU need, and a node of GPUs must not have.

    accelerate passes DeepSpeed by when `use_cpu` is set, and gathers nothing over plain DDP when
    it is not; the launcher says which of the two it started.
    """
    if torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return []
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return ["--use_cpu", "false", "--ddp_backend", "gloo"]
    return ["--use_cpu", "true"]


def refuse_several_gpus(training: TrainingArguments) -> None:
    """Refuse what TRL refuses too, but only after it has loaded the weights."""
    if training.n_gpu > 1:  # at most 1 under a launcher of several, and on a CPU
        raise ValueError(
            f"a process trains on one GPU, but this one sees {training.n_gpu}; set "
            "CUDA_VISIBLE_DEVICES=0 (or another one's number), or start a process per GPU with "
            "`accelerate launch --config_file recipes/accelerate/ddp.yaml` (make: ACCELERATE=ddp)"
        )


def assert_world(accelerator: Accelerator) -> None:
    """Refuse to start where the launcher made another number of processes than it said."""
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    mine = torch.tensor([accelerator.process_index], device=accelerator.device)
    gathered: Any = accelerator.gather(mine)
    seen = gathered.tolist()
    if accelerator.num_processes != expected or seen != list(range(expected)):
        raise RuntimeError(
            f"WORLD_SIZE is {expected}, but accelerate sees {accelerator.num_processes} processes "
            f"and a gather returned ranks {seen}; launch with one of recipes/accelerate/*.yaml"
        )


def run_folder(recipe: Recipe, resume: bool) -> Path:
    """The same folder on every process, chosen by the first."""
    chosen: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            named = recipe.training.output_dir not in (None, DEFAULT_OUTPUT)
            if named:
                chosen = [Path(recipe.training.output_dir)]
            else:
                chosen = [newest_resumable(recipe.name) if resume else new_run_folder(recipe.name)]
        except OSError as error:  # every process must hear of it, or the others wait for ever
            chosen = [error]
    broadcast_object_list(chosen)
    if isinstance(chosen[0], OSError):
        raise chosen[0]
    return chosen[0]
