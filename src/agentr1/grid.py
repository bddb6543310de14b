"""Do many training runs: some at a time, resumable after anything, each a process of its own.

Layer 7: knows commands, processes and signals; which runs there are, and what their results mean,
is its callers' matter. The log of a run is locked as long as its process lives: a grid that was
killed cannot start a second process in a folder that is still written to, and two grids with the
same runs share them out.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from agentr1.cells import Run, State, progress_line, state_of
from agentr1.commandline import add_debug
from agentr1.grid_board import Board, Job
from agentr1.runs import write_text
from agentr1.signals import StopSignals

PROGRAM = (sys.executable, "-m", "agentr1")
_POLL = 0.1  # seconds between two looks at the processes
_TAIL = 15  # lines of a failed run's log that are shown
_PATIENCE = 10  # such looks with nothing to do, before that is said
_KEPT = ("seed", "output_dir")  # options of `agentr1 train` that are the grid's to give


def run_grid(runs: Sequence[Run], jobs: int = 1, program: Sequence[str] = PROGRAM) -> list[Run]:
    """Do the runs that are not done, in their order.

    A run that another process is at is left to it, and looked at again when that one has ended.

    Args:
        runs: with folders of their own.
        jobs: so many at a time.
        program: the command that a run's arguments are given to.

    Returns:
        The runs that failed; their logs say why.

    Raises:
        ValueError: a folder holds another run.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM; what was done or saved is kept.
    """
    states = [state_of(run) for run in runs]
    foreign = [str(r.folder) for r, s in zip(runs, states, strict=True) if s is State.FOREIGN]
    if foreign:
        raise ValueError(
            f"{len(foreign)} folders hold runs of another command or recipe: {', '.join(foreign)}; "
            "delete them, or name another place with --out"
        )
    missing = [r for r, s in zip(runs, states, strict=True) if s is not State.DONE]
    heard = 0
    with _listening() as asked, Board(len(runs), len(missing), jobs) as board:
        work = _Work(missing, jobs, program, board)
        try:
            while work.waiting or work.running:
                if asked.times > heard:
                    heard = asked.times
                    work.stop(at_once=heard > 1)
                work.start()
                work.end(heard > 0)
                board.show(work.running, len(work.waiting))
                time.sleep(_POLL)
        finally:  # an exception finds some under way, in sessions of their own
            work.stop(at_once=False)
    if heard:
        done = sum(state_of(run) is State.DONE for run in runs)
        raise KeyboardInterrupt(
            f"stopped with {done} of {len(runs)} runs done; the same command goes on from there"
        )
    return work.failed


class _Work:
    """The runs of a grid that wait, are under way or failed."""

    def __init__(
        self, missing: Sequence[Run], jobs: int, program: Sequence[str], board: Board
    ) -> None:
        self.waiting = deque(missing)
        self.running: list[Job] = []
        self.failed: list[Run] = []
        self._jobs, self._program, self._board = jobs, program, board
        self._threads = None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
        self._idle = 0

    def start(self) -> None:
        """Fill the free places."""
        for _ in range(len(self.waiting)):  # each once: those of others go to the back
            if len(self.running) == self._jobs:
                break
            run = self.waiting.popleft()
            found = _start(run, self._program, self._threads)
            if isinstance(found, Job):
                self.running.append(found)
                at = f", from step {found.first_step}" if found.first_step else ""
                self._board.say(f"started {run.name}{at}")
            elif found is State.RUNNING:
                self.waiting.append(run)
            elif found is State.DONE:
                self._board.found(run)
            else:
                self.failed.append(run)
                self._board.say(
                    f"failed  {run.name}: {run.folder} now holds a run of another command or recipe"
                )
        self._idle = 0 if self.running else self._idle + 1
        if self._idle == _PATIENCE:
            names = ", ".join(run.name for run in self.waiting)
            self._board.say(f"waiting: other processes are at {names}")

    def end(self, asked: bool) -> None:
        """See which processes have ended, and how."""
        ended = [job for job in self.running if job.process.poll() is not None]
        self.running = [job for job in self.running if job not in ended]
        self.failed += [job.run for job in ended if not _ended_well(job, self._board, asked)]

    def stop(self, at_once: bool) -> None:
        """Start nothing more; ask the runs to finish their step and save, or end them there."""
        self.waiting.clear()
        for job in self.running:
            if at_once:
                job.process.kill()
            else:
                job.process.terminate()
        if self.running and not at_once:
            self._board.say(
                f"stopping: {len(self.running)} finish their step and save; Ctrl-C again ends at "
                "once"
            )


def _start(run: Run, program: Sequence[str], threads: int | None) -> Job | State:
    """Start a run, or go on with it; what it is where there is nothing to start.

    What was seen of the folder before the lock was taken may have changed: only what is seen under
    it decides whether the folder is touched.
    """
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("a", encoding="utf-8") as log:
        if not _lock(log):
            return State.RUNNING
        state = state_of(run, held=True)
        if state in (State.DONE, State.FOREIGN):
            return state
        step = _resumable_step(run.folder)
        if step == 0:
            _begin(run)
        command = [*program, *run.arguments, *(["--resume"] if step else [])]
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,  # which passes the lock on
            stderr=subprocess.STDOUT,
            env={**({"OMP_NUM_THREADS": str(threads)} if threads else {}), **os.environ},
            start_new_session=True,  # a terminal's Ctrl-C reaches the grid alone; see `_Work.stop`
        )
    return Job(run, process, time.monotonic(), step)


def _lock(log: TextIO) -> bool:
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _begin(run: Run) -> None:
    """An empty folder that says whose it is, before its process has come to say so."""
    if run.folder.exists():
        shutil.rmtree(run.folder)  # of this very run, and nothing in it to go on from
    write_text(run.folder / "recipe.yaml", run.text)
    write_text(run.folder / "command.txt", run.command + "\n")


def _resumable_step(folder: Path) -> int:
    """The newest checkpoint, 0 if none: then the run starts afresh."""
    steps = [path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def _ended_well(job: Job, board: Board, asked: bool) -> bool:
    """Say how a run ended. One that was stopped is no failure."""
    code, run = job.process.returncode, job.run
    if code == 0 and state_of(run) is State.DONE:
        board.ended(job)
        return True
    if asked:
        board.say(f"stopped {run.name} at step {run.step}")
        return True
    why = f"exit code {code}" if code else "exit code 0, but it left no evaluation"
    lines = re.split(r"[\r\n]+", run.log.read_text(encoding="utf-8", errors="replace").strip())
    board.say("\n    ".join([f"failed  {run.name}: {why}; {run.log} ends with", *lines[-_TAIL:]]))
    return False


class _Asked:
    """Counts how often the grid was asked to stop; its loop looks when it is safe to act."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # Schedulers repeat SIGTERM: only a person who presses Ctrl-C again is impatient.
        self.times = max(1, self.times + (number == signal.SIGINT))


@contextmanager
def _listening() -> Iterator[_Asked]:
    signals, asked = StopSignals(), _Asked()
    signals.take_over(asked)
    try:
        yield asked
    finally:
        signals.give_back()


# The command line ------------------------------------------------------------------------------


def grid_parser(verb: str, description: str, out: str) -> argparse.ArgumentParser:
    """The options that the verbs with a grid share."""
    parser = argparse.ArgumentParser(
        prog=f"agentr1 {verb}",
        description=description,
        epilog="Every further --key value overrides that key in all runs.",
        allow_abbrev=False,
    )
    parser.add_argument("task", help="x for the recipes in recipes/x")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, help=f"place of runs and results ({out}/TASK)")
    parser.add_argument("--report", action="store_true", help="show what there is, start nothing")
    parser.add_argument(
        "--background", action="store_true", help="run without this terminal, log to OUT/log.txt"
    )
    add_debug(parser)
    return parser


def check_options(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Refuse what no grid can be made of.

    Raises:
        ValueError: with the option, its value and the way out.
    """
    if "/" in args.task:
        raise ValueError(
            f"a task is a folder of recipes, quickstart for example, got {args.task!r}"
        )
    if len(set(args.seeds)) < len(args.seeds) or args.jobs < 1:
        raise ValueError(
            f"--seeds must differ and --jobs be at least 1, got {args.seeds} and {args.jobs}"
        )
    if given := given_of(_KEPT, overrides):
        raise ValueError(f"every run is given its own {given}; use --seeds and --out")


def given_of(keys: Collection[str], overrides: Sequence[str]) -> list[str]:
    """Those of the keys that are overridden, as they were written."""
    options = [word.partition("=")[0] for word in overrides if word.startswith("--")]
    return [option for option in options if option[2:].replace("-", "_") in keys]


def carry_out(
    args: argparse.Namespace,
    argv: Sequence[str],
    runs: Sequence[Run],
    report: Callable[[], None],
    program: Sequence[str] = PROGRAM,
) -> None:
    """Do the runs and report, or report what there is, or leave it to a process of its own.

    Args:
        args: from `grid_parser`, with `out` set.
        argv: the verb and what was written after it.
        runs: of the grid.
        report: shows and saves what the runs amount to.
        program: the command that arguments are given to.

    Raises:
        RuntimeError: runs failed; said after the report.
        ValueError, KeyboardInterrupt: see `run_grid`.
    """
    if args.report:
        print(progress_line(runs))
        report()
    elif args.background:
        words = [word for word in argv if word != "--background"]
        log = args.out / "log.txt"
        pid = detach([*program, *words], log)
        print(f"process {pid} prints to {log}; `kill {pid}` stops it, the same command goes on")
        print(f"how far it is: {shlex.join(['agentr1', *words, '--report'])}")
    else:
        failed = run_grid(runs, args.jobs, program)
        report()
        if failed:
            names = ", ".join(run.name for run in failed)
            raise RuntimeError(
                f"{len(failed)} of {len(runs)} runs failed: {names}; the same command tries those "
                "again and leaves the others as they are"
            )


def detach(command: Sequence[str], log: Path) -> int:
    """Start a command that outlives this terminal, and return its process id."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process.pid
