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
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results.report import write_report
from benchmarks.results.stages import SCALES, Stage, stages

ROOT = Path(__file__).resolve().parents[2]
TIME_IS_UP = 3
"""Exit code of a piece of the work; the next piece is the same command."""
_PATIENCE = 90.0  # seconds that a stage has to save after it was asked to stop


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
    end = time.monotonic() + options.minutes * 60 if options.minutes else float("inf")
    for stage in [] if options.report else todo:
        if options.only is None or stage.name in options.only:
            code = carry_out(stage, end)
            if code:
                return code
    write_report(out, todo, options.scale, ROOT / "docs")
    return 0


def carry_out(stage: Stage, end: float) -> int:
    """Run a stage unless it is done; 0, `TIME_IS_UP`, or its own exit code."""
    if stage.done():
        print(f"=== {stage.name}: done before", flush=True)
        return 0
    left = end - time.monotonic() - _PATIENCE
    if left <= 0:
        return _time_is_up(stage)
    print(f"=== {stage.name}: {stage.shown}", flush=True)
    start = time.monotonic()
    command = [sys.executable, "-m", *stage.command()]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            code = process.wait(timeout=None if left == float("inf") else left)
        except subprocess.TimeoutExpired:
            process.terminate()  # every stage saves and ends
            try:
                process.wait(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            return _time_is_up(stage)
        except KeyboardInterrupt:  # the stage was asked by the terminal as well
            process.wait()
            return 130
    print(f"=== {stage.name} took {time.monotonic() - start:.0f} s", flush=True)
    return code


def _time_is_up(stage: Stage) -> int:
    print(f"=== time is up in {stage.name}; the same command goes on there", flush=True)
    return TIME_IS_UP


if __name__ == "__main__":
    sys.exit(main())
