"""What a person sees of a grid while its runs go on, in a terminal or in a log.

Layer 7: reads jobs and decides nothing; `grid` tells it what happened.
"""

from __future__ import annotations

import dataclasses
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from agentr1.cells import Run

_SHOW = 1.0  # seconds between two looks at how far the runs are


@dataclasses.dataclass(slots=True)
class Job:
    """A run that is being done."""

    run: Run
    process: subprocess.Popen[bytes]
    started: float
    first_step: int

    @property
    def seconds(self) -> float:
        """Since its process was started."""
        return time.monotonic() - self.started

    @property
    def share(self) -> float:
        """Done of what was left when it was started."""
        left = self.run.steps - self.first_step
        return max(0, self.run.step - self.first_step) / left if left > 0 else 0.0


class Board:
    """A line for each event, so that a log reads well; bars besides where there is a terminal."""

    def __init__(self, total: int, missing: int, jobs: int) -> None:
        console = Console(highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._all = self._progress.add_task("runs", total=total, completed=total - missing, note="")
        self._bars: dict[str, TaskID] = {}
        self._total, self._done, self._jobs = total, total - missing, jobs
        self._took: list[float] = []
        self._left: float | None = None
        self._next_look = 0.0
        if self._done:
            self.say(f"{self._done} of {total} runs were done before")

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line, above the bars if there are any."""
        self._progress.console.print(line, markup=False, soft_wrap=True)

    def ended(self, job: Job) -> None:
        """Count a run that is done."""
        self._done += 1
        self._progress.update(self._all, completed=self._done)
        if job.first_step == 0:
            self._took.append(job.seconds)
        left = f"; {_duration(self._left)} left" if self._left else ""
        of = f"{self._done} of {self._total} done"
        self.say(f"done    {job.run.name} in {_duration(job.seconds)}; {of}{left}")

    def found(self, run: Run) -> None:
        """Count a run that another process has done meanwhile."""
        self._done += 1
        self._progress.update(self._all, completed=self._done)
        self.say(f"done    {run.name}, by another process; {self._done} of {self._total} done")

    def show(self, running: Sequence[Job], waiting: int) -> None:
        """Bring the bars and the estimate up to date."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _SHOW
        self._left = self._estimate(running, waiting)
        note = f"{_duration(self._left)} left" if self._left else ""
        self._progress.update(self._all, completed=self._done, note=note)
        for name in self._bars.keys() - {job.run.name for job in running}:
            self._progress.remove_task(self._bars.pop(name))
        for job in running:
            bar = self._bars.get(job.run.name)
            if bar is None:
                bar = self._progress.add_task(job.run.name, total=job.run.steps or None, note="")
                self._bars[job.run.name] = bar
            self._progress.update(bar, completed=job.run.step, note=_duration(job.seconds))

    def _estimate(self, running: Sequence[Job], waiting: int) -> float | None:
        """From the runs that are done, before from those that are under way."""
        shares = [(job, job.share) for job in running]
        took = self._took or [job.seconds / share for job, share in shares if share > 0.05]
        if not took:
            return None
        missing = waiting + sum(1 - share for _, share in shares)
        return missing * sum(took) / len(took) / self._jobs


def _duration(seconds: float | None) -> str:
    minutes = round((seconds or 0) / 60)
    if minutes < 2:
        return f"{seconds or 0:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
