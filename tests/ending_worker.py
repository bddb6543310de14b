"""Ends as a training does whose process group outlives it, a collective just done.

Started by `test_ranks.py` on two processes; DeepSpeed keeps such references to its groups.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from torch import distributed

from agentr1.ranks import leave_processes


def main() -> None:
    sys.setswitchinterval(100)  # only who waits lets other threads run
    accelerator = Accelerator(cpu=True)
    kept.append(distributed.group.WORLD)
    for _ in range(3):
        parts = [torch.empty(200_000) for _ in range(2)]
        work = distributed.all_gather(parts, torch.ones(200_000), async_op=True)
        work.wait()
    leave_processes(accelerator)


kept: list[distributed.ProcessGroup | None] = []
if __name__ == "__main__":
    main()
