"""Checkpoints that are complete whenever they bear their name.

Layer 6. transformers writes a checkpoint file by file into its final folder; a run killed there
leaves one that looks whole and is not. One of weights that collapsed bears another name. Knows the
Trainer's way of saving, nothing of rollouts.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

_ASIDE = "_incomplete"
"""Checkpoints are written in this folder and moved out when complete."""
_FULL = 2**22
"""Bytes; what is left where a file did not fit."""
_COLLAPSED = "collapsed"
"""In the place of `checkpoint`: nothing resumes from such a folder or goes back to it."""


class WholeCheckpoints(Trainer):
    """Write every checkpoint aside and rename it: none that bears the name is incomplete.

    Contact with transformers, pinned by `tests/test_trl_contract.py`: `_save_checkpoint` and
    `_get_output_dir`, both with `super()` around.
    """

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / _ASIDE) if getattr(self, "_saving", False) else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        final = (
            Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        )
        aside = final.parent / _ASIDE / final.name
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if not _is_full(aside.parent, error):
                raise
            shutil.rmtree(aside.parent, ignore_errors=True)
            raise OSError(
                f"no space left for {final}; checkpoints before it are whole. Free some, or make "
                "them fewer or smaller (save_total_limit, save_only_model); then --resume goes on"
            ) from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == str(aside):
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            self.state.save_to_json(str(aside / "trainer_state.json"))
            if final.exists():
                final.rename(aside.parent / f"old-{final.name}")
            aside.rename(final)
            best = self.state.best_model_checkpoint
            limit = self.args.save_total_limit
            for old in surplus(final.parent, limit, best):
                old.rename(aside.parent / f"old-{old.name}")
            for old in surplus_collapsed(final.parent, limit):
                old.rename(aside.parent / f"old-{old.name}")
            shutil.rmtree(aside.parent)
        self.accelerator.wait_for_everyone()


def _is_full(folder: Path, error: Exception) -> bool:
    """Whether this is why a file could not be written; torch names a position, and no reason."""
    if any(os.strerror(reason) in str(error) for reason in (errno.ENOSPC, errno.EDQUOT)):
        return True
    return folder.is_dir() and shutil.disk_usage(folder).free < _FULL


def surplus(folder: Path, limit: int | None, best: str | None) -> list[Path]:
    """The checkpoints that transformers' `rotate_checkpoints` would delete.

    It deletes them where they are, file by file: a run killed there leaves one that is not whole.
    """
    if limit is None or limit <= 0:
        return []
    found = [Path(path) for path in sort_checkpoints(str(folder), use_mtime=True)]
    kept = {found[-1], Path(best) if best else found[-1]}
    count = len(found) - max(limit, len(kept))
    return [path for path in found if path not in kept][: max(0, count)]


def put_aside(folder: Path, after: int, best: str | None) -> None:
    """Rename the checkpoints of later steps, those of weights that collapsed.

    Args:
        folder: of the run.
        after: step of the checkpoint that the run went back to.
        best: the checkpoint that stays because it was evaluated best, if any.
    """
    for step, path in _numbered(folder, PREFIX_CHECKPOINT_DIR):
        if step > after and path != Path(best or ""):
            aside = folder / f"{_COLLAPSED}-{step}"
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was resumed before that step
            path.rename(aside)


def surplus_collapsed(folder: Path, limit: int | None) -> list[Path]:
    """The oldest of those put aside, as far as all checkpoints together exceed the limit."""
    if limit is None or limit <= 0:
        return []
    found = [path for _, path in _numbered(folder, _COLLAPSED)]
    room = limit - len(_numbered(folder, PREFIX_CHECKPOINT_DIR))
    return found[: max(0, len(found) - max(0, room))]


def _numbered(folder: Path, prefix: str) -> list[tuple[int, Path]]:
    found = [(path.name.rpartition("-")[2], path) for path in folder.glob(f"{prefix}-*")]
    return sorted((int(step), path) for step, path in found if step.isdigit())


def between_batches(args: TrainingArguments, state: TrainerState) -> bool:
    """True where the next step generates afresh; always with one optimizer step per batch.

    A batch that was begun is not in a checkpoint, and a run resumed in its middle would draw
    another.
    """
    given: Any = args
    micro_batches = (given.steps_per_generation or 1) * given.num_iterations
    return state.global_step * args.gradient_accumulation_steps % micro_batches == 0
