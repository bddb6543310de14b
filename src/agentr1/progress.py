"""What a person sees and a file keeps while a run goes on.

Two callbacks of the Trainer: a bar with reward, metric, turns, calls and time left, and the lines
of `metrics.jsonl`. They read what was logged and decide nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from agentr1.runs import append_metrics

_SHOWN = {
    "reward": "reward",
    "rollout/exact_match": "exact match",
    "rollout/turns": "turns",
    "rollout/calls": "calls",
    "eval_exact_match": "dev",
}
"""Logged name to the word on the bar."""


def use_our_progress(trainer: Any, callbacks: Sequence[TrainerCallback]) -> None:
    """Replace the Trainer's own bar and printer."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    for callback in callbacks:
        trainer.add_callback(callback)


class ProgressBar(TrainerCallback):
    """One line: steps, time left, and the latest numbers; on the first process only."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._numbers: dict[str, str] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Open the bar at the step a resumed run starts from."""
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Move on by one step."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest numbers."""
        if self._bar is not None:
            known = {word: (logs or {}).get(name) for name, word in _SHOWN.items()}
            self._numbers |= {k: f"{v:.2f}" for k, v in known.items() if v is not None}
            self._bar.set_postfix(self._numbers)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class MetricsFile(TrainerCallback):
    """Every logged dictionary as a line of `metrics.jsonl`, with the wall-clock time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append the line; on the first process only."""
        if state.is_world_process_zero and logs:
            append_metrics(self._folder, state.global_step, {"time": time.time(), **logs})
