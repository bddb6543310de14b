"""The collapse guard: sees that training collapses, and does what the run's settings say.

Layer 6: a callback of the Trainer and two calls of `AgentTrainer` around each generation batch.
What is a collapse is judged in `collapse.py`, from logged metrics, which are the same on every
process, so every process decides alike. The guard adds two metrics of its own about the batch
before: the share of its silent groups, those whose rollouts differ neither in outcome nor in the
rewards of turns, and the likelihood displacement of rewarded tokens, a forward pass over a few
rows. Knows tensors and the Trainer's checkpoints, nothing of turns.

The step counter goes on when weights go back: steps, seeds, rows, checkpoints and learning-rate
schedule keep their order, so `--resume` needs to know nothing. Weights and optimizer state are
those of the checkpoint.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, is_peft_model
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from agentr1.checkpoints import between_batches, put_aside
from agentr1.collapse import COOL_DOWN, Alarm, Judge, records_suspect
from agentr1.displacement import Rewarded, displacement, rewarded_rows
from agentr1.guard_config import check_kept, guard_window
from agentr1.refill import PlayedBatch

FACTOR = 0.5
"""Of the learning rate, at every answer to an alarm."""
MOST_ANSWERS = 5
"""Of one run: the rate is lowered so often, and after as many returns the run stops."""
_ACTING = ("lower_lr", "roll_back")
_FEW_CALLS = 0.1  # per episode: of fewer, a share says nothing
_KEY = "CollapseGuard"
_LOGGER = logging.getLogger(__name__)


def lower_learning_rate(optimizer: Any, scheduler: Any, factor: float = FACTOR) -> float:
    """Multiply the learning rate of now and of the rest of the schedule.

    A scheduler computes each step's rate from its `base_lrs`, and both are in its checkpoint; a
    change of the optimizer's rate alone would be undone at the next step.

    Returns:
        The new rate of the first group.
    """
    schedule = inner_scheduler(scheduler)
    schedule.base_lrs = [factor * rate for rate in schedule.base_lrs]
    schedule._last_lr = [factor * rate for rate in schedule._last_lr]
    rates = zip(schedule.base_lrs, schedule._last_lr, strict=True)
    for group, (base, rate) in zip(optimizer.param_groups, rates, strict=True):
        group["lr"], group["initial_lr"] = rate, base
    return schedule._last_lr[0]


def inner_scheduler(scheduler: Any) -> Any:
    """Without accelerate's wrapper.

    Raises:
        ValueError: it has no base rate that could be lowered.
    """
    schedule = getattr(scheduler, "scheduler", scheduler)
    if not hasattr(schedule, "base_lrs"):
        raise ValueError(
            "collapse_guard lower_lr and roll_back need a scheduler with base_lrs, got "
            f"{type(schedule).__name__}; use an lr_scheduler_type other than reduce_lr_on_plateau "
            "and greedy and no scheduler of DeepSpeed's own, or set collapse_guard: warn"
        )
    return schedule


def load_weights_and_optimizer(trainer: Any, checkpoint: Path) -> None:
    """Go back to a checkpoint in the middle of a run; the schedule stays where it is.

    Args:
        trainer: in training, on one process, under DDP or DeepSpeed; with or without an adapter.
        checkpoint: complete, with the optimizer's state.
    """
    schedule = inner_scheduler(trainer.lr_scheduler)
    now = copy.deepcopy(schedule.state_dict())
    if trainer.is_deepspeed_enabled:
        whole = not is_peft_model(trainer.model)  # frozen weights are not in the checkpoint
        deepspeed_load_checkpoint(trainer.model_wrapped, str(checkpoint), load_module_strict=whole)
    else:
        trainer._load_from_checkpoint(str(checkpoint))
    trainer._load_optimizer_and_scheduler(str(checkpoint))
    trainer._load_scaler(str(checkpoint))
    schedule.load_state_dict(now)


class CollapseGuard(TrainerCallback):
    """Warns when training collapses, and may lower the learning rate or go back.

    `AgentTrainer` adds it to its callbacks and calls `before_generation` and `after_credit`. Its
    state is in `trainer_state.json` of every checkpoint.

    Contact with TRL 1.16 and transformers, through the trainer it is handed:

    - `_get_per_token_logps_and_entropies`, `_log_metric`: private calls.
    - `_episodes`, `_reward_table`, `_silent` of `AgentTrainer`: the batch before.
    - `_load_from_checkpoint`, `_load_optimizer_and_scheduler`, `_load_scaler`: private calls, what
      the Trainer calls to resume, here in the middle of a run.
    - `state.stateful_callbacks`: written, as the Trainer does for an `ExportableState`. That class
      is restored as a new object, which the trainer would not know.
    - `base_lrs`, `_last_lr` of torch's schedulers: written.

    Args:
        config: an `AgentConfig` that has been checked for an environment.
    """

    def __init__(self, config: Any) -> None:
        self._response: str = config.collapse_guard
        self._adds_process_rewards = config.process_credit == "turn"  # else they are in the reward
        window = guard_window(config)
        self._judge = Judge(config.max_turns, window)
        self._suspect = records_suspect(window)
        self._rows: Rewarded | None = None
        self._alarm: Alarm | None = None
        self._lowered = self._returns = 0
        self._seen = 0
        self._saved: list[tuple[int, int]] = []  # step of a checkpoint, records before its weights
        self._returned = (0, 0)  # to the checkpoint of this step, after so many records
        self._copied: int | None = None  # records before the weights gone back to, till saved again

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Go on where the checkpoint of a resumed run stood."""
        if self._acts:
            inner_scheduler(kwargs.get("lr_scheduler"))
        if self._response == "roll_back":
            _check_kept(args, state)
        found: Any = state.stateful_callbacks
        if state.global_step and _KEY in found:
            self._load(found[_KEY])
            self._note_checkpoint(args, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Judge a record of training."""
        if self._response == "off" or not logs or logs.get("reward") is None:
            return
        reward = logs["reward"]
        if self._adds_process_rewards:
            reward += logs.get("rollout/process_reward", 0.0)
        self._seen += 1
        found = self._judge.observe(reward, signals(logs))
        if found is not None:
            self._alarm = found
            if state.is_world_process_zero:
                _LOGGER.warning("step %d: %s", state.global_step, _advice(found, self._response))
        self._keep(state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Ask for a checkpoint after a return, so that `--resume` does not find a collapsed one.

        What was done since the last record goes where a checkpoint takes it from.
        """
        if self._copied is not None and between_batches(args, state):
            control.should_save = True
        self._keep(state)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Remember when the checkpoint was written."""
        self._note_checkpoint(args, state)

    def before_generation(self, trainer: Any) -> None:
        """Answer an alarm, and measure what the update did to the batch before.

        Between two generation batches: nothing that the old weights sampled is left. The same
        collectives on every process.

        Args:
            trainer: an `AgentTrainer` in training.
        """
        if self._response == "off":
            return
        trainer._log_metric("guard/triggered", float(self._alarm is not None))
        if self._alarm is not None:
            if self._acts:
                self._answer(trainer, self._alarm)
            self._alarm = None
        if self._rows is not None:
            trainer._log_metric("guard/silent_groups", silent_share(trainer))
            moved = displacement(trainer, self._rows)
            if moved is not None:
                trainer._log_metric("guard/displacement", moved)

    def after_credit(self, output: Mapping[str, Tensor], rewards: Tensor) -> None:
        """Keep a few rows for the next measurement.

        Args:
            output: of `_generate_and_score_completions`, its advantages final.
            rewards: outcome rewards of all processes, (B_global,).
        """
        if self._response != "off":
            self._rows = rewarded_rows(output)
            self._judge.scale(rewards.tolist())

    @property
    def _acts(self) -> bool:
        return self._response in _ACTING

    def _answer(self, trainer: Any, alarm: Alarm) -> None:
        done = []
        if self._response == "roll_back":
            if self._returns == MOST_ANSWERS:
                raise RuntimeError(
                    f"training collapsed again after {MOST_ANSWERS} returns to a healthy "
                    f"checkpoint: {alarm}; checkpoints are in {trainer.args.output_dir}, start "
                    "from one with another learning_rate or beta, or with other rewards"
                )
            checkpoint = self._healthy(trainer.args)
            if checkpoint is None:
                done.append("no checkpoint is old enough to be healthy, so the weights stay")
            else:
                self._go_back(trainer, checkpoint)
                done.append(f"weights and optimizer are those of {checkpoint}")
        if self._lowered < MOST_ANSWERS:
            self._lowered += 1
            rate = lower_learning_rate(trainer.optimizer, trainer.lr_scheduler)
            done.append(f"the learning rate is {rate:.3g}")
        if done:
            trainer.accelerator.print(f"collapse guard, step {trainer.state.global_step}:", *done)

    def _go_back(self, trainer: Any, checkpoint: Path) -> None:
        load_weights_and_optimizer(trainer, checkpoint)
        if trainer.args.should_save:
            put_aside(checkpoint.parent, self._returned[0], trainer.state.best_model_checkpoint)
        trainer.accelerator.wait_for_everyone()
        self._judge.resume()
        self._returns += 1
        self._rows = None  # what the collapsed policy sampled says nothing about this one

    def _healthy(self, args: Any) -> Path | None:
        """Choose a checkpoint older than the collapse; the first process looks what is there."""
        root = Path(str(args.output_dir))
        chosen: list[Any] = [next((n for n in self._old() if _folder(root, n).is_dir()), None)]
        broadcast_object_list(chosen)
        if chosen[0] is None:
            return None
        self._returned = (chosen[0], self._seen)
        self._saved = [(step, seen) for step, seen in self._saved if step <= chosen[0]]
        self._copied = dict(self._saved)[chosen[0]]
        return _folder(root, chosen[0])

    def _old(self) -> list[int]:
        """Steps of checkpoints that may be healthy, the first choice first.

        That is the newest, and of the same weights the first. But after a run has collapsed again
        at once, those from before the one it went back to come first.
        """
        step, seen = self._returned
        again = step > 0 and self._seen - seen < self._suspect + COOL_DOWN
        old = [s for s in self._saved if self._seen - s[1] >= self._suspect]
        return [n for *_, n in sorted((again and n >= step, -then, n) for n, then in old)]

    def _note_checkpoint(self, args: TrainingArguments, state: TrainerState) -> None:
        """Weights that were gone back to stay as old as they are."""
        seen = self._seen if self._copied is None else self._copied
        self._saved.append((state.global_step, seen))
        if between_batches(args, state):
            self._copied = None

    def _keep(self, state: TrainerState) -> None:
        found: Any = state.stateful_callbacks
        found[_KEY] = {
            "judge": self._judge.state(),
            "alarm": self._alarm and dataclasses.asdict(self._alarm),
            "counts": (self._lowered, self._returns, self._seen),
            "saved": self._saved,
            "returned": self._returned,
            "copied": self._copied,
        }

    def _load(self, found: Mapping[str, Any]) -> None:
        self._judge.load(found["judge"])
        self._alarm = Alarm(**found["alarm"]) if found["alarm"] else None
        self._lowered, self._returns, self._seen = found["counts"]
        self._saved = [(step, seen) for step, seen in found["saved"]]
        self._returned = (found["returned"][0], found["returned"][1])
        self._copied = found["copied"]


def silent_share(trainer: Any) -> float:
    """Of the groups of the last batch on this process: those whose rollouts were paid alike.

    Args:
        trainer: an `AgentTrainer` that has played one.
    """
    episodes = trainer._episodes
    rewards = trainer._mine(trainer._reward_table, len(episodes))
    silent = trainer._silent(PlayedBatch([], episodes, rewards))
    return len(silent) * trainer._group_size / len(episodes)


def signals(logs: Mapping[str, Any]) -> dict[str, float]:
    """What `collapse.RULES` judges in a logged record."""
    mistakes = logs.get("rollout/mistakes") or 0.0
    calls = max(mistakes, logs.get("rollout/calls") or 0.0)  # an empty turn is a mistake, no call
    found = {
        "displacement": logs.get("guard/displacement"),
        "entropy": logs.get("entropy"),
        "silent groups": logs.get("guard/silent_groups"),
        "turns": logs.get("rollout/turns"),
        "invalid calls": mistakes / calls if calls > _FEW_CALLS else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _advice(alarm: Alarm, response: str) -> str:
    way = "lower learning_rate, raise beta, look at trajectories/ for what the reward pays for"
    act = "" if response != "warn" else ", or set collapse_guard: lower_lr or roll_back"
    return f"training seems to collapse: {alarm}. Ways out: {way}{act}; docs/stability.md"


def _folder(root: Path, step: int) -> Path:
    return root / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _check_kept(args: TrainingArguments, state: TrainerState) -> None:
    """What configuration alone could not tell: steps given as a share of the run, or as epochs."""
    epoch = state.max_steps / state.num_train_epochs
    record = state.logging_steps if args.logging_strategy == "steps" else epoch
    saving: Any = args.save_strategy
    check_kept(args, record, {"steps": state.save_steps, "epoch": epoch}.get(saving.value))
