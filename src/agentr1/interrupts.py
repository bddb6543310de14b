"""Stopping a run from outside without losing it: Ctrl-C, or SIGTERM from a scheduler.

Layer 6: a callback of the Trainer that `train.py` uses around `Trainer.train`. The first signal
lets the optimizer step finish, saves a checkpoint on all processes after the same step and raises
`KeyboardInterrupt` with what to do next; a second Ctrl-C ends the process where it stands. Knows
signals and the Trainer's control flags, nothing of rollouts: a handler that is not Python's own
keeps `asyncio.run` from cancelling the rollout in progress.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from agentr1.checkpoints import between_batches
from agentr1.ranks import on_any_process
from agentr1.signals import StopSignals

EXIT_CODE = 130
"""128 + SIGINT, what a shell shows after Ctrl-C."""


class Interrupts(TrainerCallback):
    """Stop after the step at which any process was asked to.

    Signals are taken over when the training loop begins and given back when the `with` block
    ends; before the first step they do what they do in any Python program. A signal that is
    ignored (a job in the background) stays ignored.

    Attributes:
        stopping: the processes have agreed to stop; the same on all of them.

    Raises:
        KeyboardInterrupt: from the Trainer's loop, once the checkpoint is written. Not raised
            after the last step, where training is over anyway.
    """

    def __init__(self) -> None:
        self.stopping = False
        self._asked = False
        self._signals = StopSignals()

    def __enter__(self) -> Interrupts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._signals.give_back()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the signals over."""
        self._signals.take_over(self._ask)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop here if any process was asked to."""
        self._agree(args, state, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """The same for a signal that came during the evaluation after a step."""
        self._agree(args, state, control)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save after all where `save_strategy: best` dropped the request."""
        self._agree(args, state, control)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leave the loop, now that the checkpoint is complete."""
        self._agree(args, state, control)
        if self.stopping and state.global_step < state.max_steps:
            raise KeyboardInterrupt(
                f"stopped after step {state.global_step} of {state.max_steps}; checkpoint-"
                f"{state.global_step} in {args.output_dir} is complete, and the same command with "
                "--resume goes on from there"
            )

    def _agree(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """One small collective on every process, at the same places of the loop.

        Only between two generation batches, so that the run can be resumed as if nothing had been.
        """
        if not self.stopping and between_batches(args, state):
            self.stopping = on_any_process(self._asked, args.device)
        if self.stopping and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        # The kernel's own action ends a process that is stuck in a collective or a library too.
        # It spares the first process of a container, which has to do it itself.
        at_once: Any = _exit if os.getpid() == 1 else signal.SIG_DFL
        self._signals.change(signal.SIGINT, at_once)
        # The launcher passes a second Ctrl-C on as SIGTERM. But schedulers signal the launcher and
        # its processes alike: a SIGTERM after a SIGTERM says nothing new.
        later: Any = at_once if number == signal.SIGINT else signal.SIG_IGN
        self._signals.change(signal.SIGTERM, later)
        if os.environ.get("RANK", "0") == "0":
            os.write(2, _notice().encode())  # `print` may be what the signal interrupted


def _notice() -> str:
    grace = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    limit = f", for which the launcher waits {grace} s" if launched else ""
    return f"\nfinishing this step and saving{limit}; Ctrl-C again stops at once\n"


def _exit(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_CODE)
