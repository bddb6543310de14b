"""Checkpoints that are complete whenever they bear their name.

Layer 5. transformers writes a checkpoint file by file into its final folder; a run killed there
leaves one that looks whole and is not. Knows the Trainer's way of saving, nothing of rollouts.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

_ASIDE = "_incomplete"
"""Checkpoints are written in this folder and moved out when complete."""


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
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        aside = final.parent / _ASIDE / final.name
        if self.state.best_model_checkpoint == str(aside):
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            self.state.save_to_json(str(aside / "trainer_state.json"))
            if final.exists():
                final.rename(aside.parent / f"old-{final.name}")
            aside.rename(final)
            best = self.state.best_model_checkpoint
            for old in surplus(final.parent, self.args.save_total_limit, best):
                old.rename(aside.parent / f"old-{old.name}")
            shutil.rmtree(aside.parent)
        self.accelerator.wait_for_everyone()


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
