"""What the collapse guard needs of a configuration: its schedule, its records, its checkpoints.

Layer 5. Reads fields of ours and of TRL; `config` calls it before weights load, `guard` once steps
are known that were given as a share of the run. Knows no trainer and no file.
"""

from __future__ import annotations

from typing import Any

from agentr1.collapse import records_judged, records_suspect

_WITHOUT_A_RATE = ("reduce_lr_on_plateau", "greedy")
"""Schedules that compute no rate from a base that could be lowered."""


def check_guard(config: Any) -> None:
    """Refuse a collapse guard that could not do what it is asked to.

    Args:
        config: an `AgentConfig`.

    Raises:
        ValueError: with the setting, its value and the way out.
    """
    response, step = config.collapse_guard, config.gradient_accumulation_steps
    schedule, saving = config.lr_scheduler_type.value, config.save_strategy.value
    if response in ("lower_lr", "roll_back"):
        if config.logging_strategy == "no":
            raise ValueError(
                f"collapse_guard {response} reads what is logged, but logging_strategy is 'no'; "
                "set logging_steps, or collapse_guard: warn"
            )
        if schedule in _WITHOUT_A_RATE:
            raise ValueError(
                f"collapse_guard {response} lowers the rate of a schedule, but lr_scheduler_type "
                f"{schedule!r} has none; use another one, or set "
                "collapse_guard: warn"
            )
    if response != "roll_back":
        return
    if saving == "no" or config.save_only_model:
        raise ValueError(
            "collapse_guard roll_back needs checkpoints with the optimizer's state, got "
            f"save_strategy={saving!r}, save_only_model="
            f"{config.save_only_model}; set save_strategy: steps and save_only_model: false"
        )
    if (config.steps_per_generation or 1) * config.num_iterations % step:
        raise ValueError(
            "collapse_guard roll_back goes back between two generation batches, but with "
            f"steps_per_generation x num_iterations = {config.steps_per_generation} x "
            f"{config.num_iterations} one begins inside an optimizer step of {step}; make "
            "it a multiple of gradient_accumulation_steps"
        )
    counts = config.logging_strategy == config.save_strategy == "steps"
    absolute = counts and config.logging_steps >= 1 and config.save_steps >= 1
    check_kept(config, config.logging_steps, config.save_steps if absolute else None)


def check_kept(config: Any, logging_steps: float, save_steps: float | None) -> None:
    """Refuse to delete the checkpoints that the guard would go back to.

    Args:
        config: an `AgentConfig` with `collapse_guard: roll_back`.
        logging_steps: between two records.
        save_steps: between two checkpoints; None where it is not known.

    Raises:
        ValueError: with the limit and the way out.
    """
    limit = config.save_total_limit
    if limit is None or limit < 1:
        return
    older = limit - 1 - bool(config.load_best_model_at_end)  # than the newest; the best is any
    span = records_suspect(guard_window(config)) * max(logging_steps, _batch_steps(config))
    if older < 1 or (save_steps is not None and older * save_steps < span):
        best = " and the best" if config.load_best_model_at_end else ""
        every = "" if save_steps is None else f", one every {save_steps:g} steps"
        raise ValueError(
            "collapse_guard roll_back goes back to a checkpoint from before the collapse, "
            f"{span:g} steps old or older, but save_total_limit={limit} keeps {max(0, older)} "
            f"beside the newest{best}{every}; raise save_total_limit or save_steps"
        )


def guard_window(config: Any) -> int:
    """Records whose means the guard judges: as many as hold enough groups of rollouts.

    Args:
        config: an `AgentConfig`.
    """
    groups = config.generation_batch_size / config.num_generations
    counts = config.logging_strategy == "steps" and config.logging_steps >= 1
    steps = config.logging_steps if counts else 1
    return records_judged(groups * max(1, steps / _batch_steps(config)))


def _batch_steps(config: Any) -> float:
    """Updates of a generation batch: what is logged between two batches is no record."""
    batch = (config.steps_per_generation or 1) * config.num_iterations
    return batch / config.gradient_accumulation_steps
