"""One process at a time in a folder: a lock that ends with the process that holds it.

Layer 1. Used by what writes data sets, builds indexes and evaluates; knows none of them.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO


def locked(file: Path, folder: Path) -> IO[str]:
    """Take a lock without waiting; closing the file that comes back gives it up.

    Args:
        file: to be locked; made if it does not exist.
        folder: that the lock stands for, as the error names it.

    Raises:
        RuntimeError: another process holds it.
    """
    lock = file.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise RuntimeError(
            f"another process is writing {folder}; wait for it, or give another --out"
        ) from error
    return lock
