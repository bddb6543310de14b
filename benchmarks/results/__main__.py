"""The project's own results: SmolLM2-135M-Instruct on real multi-hop questions, from data to table.

One stage after another, each an `agentr1` command that skips what it has done before, so that this
command may be stopped at any time (Ctrl-C, or `--minutes` is over) and goes on when it is given
again. With `--jobs` several trainings share a GPU.

    python -m benchmarks.results --source ../shared/data/multihop
    python -m benchmarks.results --minutes 8.5 --jobs 5
    python -m benchmarks.results --scale cpu
    python -m benchmarks.results --report
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentr1.runs import write_json
from agentr1.signals import StopSignals
from benchmarks.results.report import write_report
from benchmarks.results.stages import SCALES, Stage, stages

ROOT = Path(__file__).resolve().parents[2]
TIME_IS_UP = 3
"""Exit code of a piece of the work; the next piece is the same command."""
PATIENCE = 90.0  # seconds that a stage has to save after it was asked to stop


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is missing, as far as the time goes, then write docs/results.*."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    add = parser.add_argument
    add("--source", default="hub", help="hub, or a folder with the data sets (see docs/data.md)")
    add("--out", type=Path, default=Path("runs/results"))
    add("--scale", default="gpu", choices=list(SCALES), help="how much of it")
    add("--seeds", type=int, nargs="+", default=[1, 2])
    add("--jobs", type=int, default=1, help="trainings at a time")
    add("--minutes", type=float, help="stop in good time before so many are over")
    add("--only", nargs="+", metavar="STAGE", help="some of the stages")
    add("--report", action="store_true", help="write docs/results.* from what there is")
    options = parser.parse_args(argv)
    out = options.out / options.scale
    todo = stages(out, options.source, options.scale, options.seeds, options.jobs)
    if unknown := sorted(set(options.only or ()).difference(stage.name for stage in todo)):
        parser.error(f"no stage {unknown}; the stages are {[stage.name for stage in todo]}")
    end = time.monotonic() + options.minutes * 60 if options.minutes else math.inf
    with alone_in(out):
        plan = agreed(out, {"source": options.source, "scale": options.scale})
        for stage in [] if options.report else todo:
            if options.only is None or stage.name in options.only:
                code = carry_out(stage, end)
                if code:
                    return code
        write_report(out, todo, plan, ROOT / "docs")
    return 0


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Refuse to work where another process does."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"another process is at work in {out}")
        yield


def agreed(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """What the work here was begun with; another plan is refused."""
    path = out / "plan.json"
    if not path.exists():
        write_json(path, plan)
    begun = json.loads(path.read_text(encoding="utf-8"))
    if begun != plan:
        sys.exit(f"{out} was begun with {begun}, not {plan}; give the same, or another --out")
    return begun


def carry_out(stage: Stage, end: float) -> int:
    """Run a stage unless it is done; 0, `TIME_IS_UP`, or its own exit code."""
    if stage.done():
        print(f"=== {stage.name}: done before", flush=True)
        return 0
    if time.monotonic() > end - PATIENCE:
        return _time_is_up(stage)
    print(f"=== {stage.name}: {stage.shown}", flush=True)
    start, asked = time.monotonic(), 0.0
    signals, heard = StopSignals(), list[int]()
    signals.take_over(lambda number, frame: heard.append(number))
    try:
        with subprocess.Popen([sys.executable, "-m", *stage.command()], cwd=ROOT) as process:
            while process.poll() is None:
                if not asked and (heard or time.monotonic() > end - PATIENCE):
                    asked = time.monotonic()
                    process.send_signal(signal.SIGTERM)  # a stage saves and ends
                if asked and time.monotonic() > asked + PATIENCE:
                    process.send_signal(signal.SIGINT)  # a grid then ends what it has started
                    asked = math.inf
                time.sleep(0.1)
    finally:
        signals.give_back()
    print(f"=== {stage.name} took {time.monotonic() - start:.0f} s", flush=True)
    if asked and not stage.done():
        return 130 if heard else _time_is_up(stage)
    return process.returncode


def _time_is_up(stage: Stage) -> int:
    print(f"=== time is up in {stage.name}; the same command goes on there", flush=True)
    return TIME_IS_UP


if __name__ == "__main__":
    sys.exit(main())
