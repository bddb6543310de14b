"""Real processes for tests: started as a user starts them, ended with all their children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


def environment(**more: str) -> dict[str, str]:
    """Offline, on the CPU, one thread per process; the launcher kills five seconds after a signal.

    `tests` is on the path for the modules that a recipe or a worker names.
    """
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ours = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": path, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    return {**os.environ, **quiet, **ours, **more}


def launcher(configuration: str) -> tuple[str, ...]:
    """`accelerate launch` with one of recipes/accelerate; what is launched comes after."""
    file = ROOT / "recipes" / "accelerate" / f"{configuration}.yaml"
    return (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file))


class Job:
    """A running command whose output, both streams together, is kept in a file."""

    def __init__(self, command: Sequence[str], log: Path, **more: str) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(**more),
                stdout=file,
                stderr=file,
                # A test started in the background passes on that Ctrl-C is ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, happened: Callable[[], object], seconds: float = 100) -> None:
        """Wait until something is so; fail if the process ends or the time does before."""
        end = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"ended too early:\n{self.output[-6000:]}"
            assert time.monotonic() < end, f"not within {seconds} s:\n{self.output[-6000:]}"
            time.sleep(0.02)

    def wait(self, seconds: float) -> int:
        """The exit code; a process that is still there after so long has failed the test."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds} s:\n{self.output[-6000:]}") from None


@contextmanager
def job(command: Sequence[str], log: Path, **more: str) -> Iterator[Job]:
    """Start a command and leave nothing of it behind, whatever happens meanwhile."""
    running = Job(command, log, **more)
    try:
        yield running
    finally:
        # The launcher's workers have sessions of their own: a signal to a group misses them.
        for process in _family(running.process.pid):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        running.process.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []
