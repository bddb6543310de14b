"""What keeps the processes of a run in step around a rollout.

Layer 5, called by the trainer and by `interrupts`. Episodes take different numbers of turns on
each process, so inside a rollout nothing may wait for another process; these are the few places
before and after it where they meet. Each is a collective: every process calls it, the same number
of times. Knows torch's processes, nothing of TRL or of rollouts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

_Result = TypeVar("_Result")
_LETTING_GO = 0.5
"""Seconds without the interpreter's lock in which gloo's threads let go of the last tensors."""


def together(work: Callable[[], _Result]) -> _Result:
    """Do something on every process; where it fails on one, it fails on all of them.

    Otherwise the others would wait for the failed one in the next collective: until the launcher
    has noticed, or for ever.

    Raises:
        RuntimeError: it failed elsewhere; the message quotes the first failure.
    """
    try:
        result, failure = work(), None
    except Exception as error:
        result, failure = None, error
    failures = gather_object([] if failure is None else [str(failure)])
    if failures:
        raise failure or RuntimeError(f"on another process: {failures[0]}")
    done: Any = result  # None only where `work` returned None
    return done


def means_over_processes(means: Mapping[str, float], count: int) -> dict[str, float]:
    """Means over the episodes of all processes; a name that one of them lacks counts as 0 there.

    Args:
        means: of this process.
        count: episodes behind them.
    """
    everyone: list[tuple[int, dict[str, float]]] = gather_object([(count, dict(means))])
    total = sum(n for n, _ in everyone)
    names = dict.fromkeys(name for _, found in everyone for name in found)
    return {name: sum(n * found.get(name, 0.0) for n, found in everyone) / total for name in names}


def on_any_process(flag: bool, device: torch.device) -> bool:
    """True on all processes where it is true on one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    raised = torch.tensor([int(flag)], device=device)
    torch.distributed.all_reduce(raised, op=torch.distributed.ReduceOp.MAX)
    return bool(raised.item())


@contextmanager
def without_collective_hooks(model: torch.nn.Module) -> Iterator[None]:
    """Forward passes of a rollout without the hook by which ZeRO-3 compares the processes.

    TRL's unwrapping takes the hooks off the layers and leaves the one on the model itself. It
    broadcasts in the first passes after an update, so a process with fewer passes than the others
    (an evaluation with fewer rows than processes) would leave them waiting.
    """
    hooks = model._forward_pre_hooks
    theirs = {
        key: hook
        for key, hook in hooks.items()
        if str(getattr(hook, "__module__", "")).startswith("deepspeed.")
    }
    for key in theirs:
        del hooks[key]
    try:
        yield
    finally:
        hooks.update(theirs)


def leave_processes(accelerator: Accelerator) -> None:
    """End the trackers and the process group, so that the interpreter can end too.

    A thread of gloo that lets go of a tensor takes the interpreter's lock; where the interpreter is
    ending it is aborted instead ("terminate called without an active exception", pytorch issue
    190489), and a finished run counts as failed. The threads end with the group's last reference,
    but DeepSpeed keeps one, and gloo cannot be asked whether they are idle.
    """
    several = torch.distributed.is_initialized()
    accelerator.end_training()
    if several:
        time.sleep(_LETTING_GO)
