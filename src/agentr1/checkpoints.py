"""Checkpoints that are complete whenever they bear their name.

Layer 5. transformers writes a checkpoint file by file into its final folder; a run killed there
leaves one that looks whole and is not. Knows the Trainer's way of saving, nothing of rollouts.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

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
            shutil.rmtree(aside.parent)
            rotate_checkpoints(
                output_dir=str(final.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
