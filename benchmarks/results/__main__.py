"""The project's own results: SmolLM2-135M-Instruct on real multi-hop questions, from data to table.

One stage after another, each an `agentr1` command that skips what it has done before, so that this
command may be stopped at any time (Ctrl-C, or `--minutes` is over) and goes on when it is given
again. With `--jobs` several trainings share a GPU.

    python -m benchmarks.results --source PATH
    python -m benchmarks.results --minutes 8.5 --jobs 5
    python -m benchmarks.results --scale cpu
    python -m benchmarks.results --report
"""

from __future__ import annotations

import argparse
import dataclasses
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
from benchmarks.results.report import seeds_of, write_report
from benchmarks.results.stages import SCALES, Stage, stages

ROOT = Path(__file__).resolve().parents[2]
TIME_IS_UP = 3
"""Exit code of a piece of the work; the next piece is the same command."""
PATIENCE = 90.0  # seconds that a stage has to save after it was asked to stop


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is missing, as far as the time goes, then write docs/results.*."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    add = parser.add_argument
    add("--source", help="hub, or a folder with the data sets; by default that begun with")
    add("--out", type=Path, default=Path("runs/results"))
    add("--scale", default="gpu", choices=list(SCALES), help="how much of it")
    add("--seeds", type=int, nargs="+", default=[1, 2])
    add("--jobs", type=int, default=1, help="trainings at a time")
    add("--minutes", type=float, help="stop in good time before so many are over")
    add("--only", nargs="+", metavar="STAGE", help="some of the stages")
    add("--report", action="store_true", help="write docs/results.* from what there is")
    options = parser.parse_args(argv)
    out = options.out / options.scale
    source = options.source or begun(out).get("source", "hub")
    todo = stages(out, source, options.scale, options.seeds, options.jobs)
    if unknown := sorted(set(options.only or ()).difference(stage.name for stage in todo)):
        parser.error(f"no stage {unknown}; the stages are {[stage.name for stage in todo]}")
    end = time.monotonic() + options.minutes * 60 if options.minutes else math.inf
    if not options.report:
        with alone_in(out):
            settings = dataclasses.asdict(SCALES[options.scale])
            agree(out, {"source": source, "scale": options.scale, "settings": settings})
            for stage in todo:
                if options.only is None or stage.name in options.only:
                    refuse_to_renew(stage, todo, out)
                    code = carry_out(stage, end)
                    if code:
                        return code
    seeds = seeds_of(out) or options.seeds
    place = "hub" if source == "hub" else "PATH"  # which folder it was tells nobody else anything
    todo = stages(out, place, options.scale, seeds, options.jobs)
    told = {"source": place, "scale": options.scale, "seeds": " ".join(map(str, seeds))}
    write_report(out, todo, told, ROOT / "docs")
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


def begun(out: Path) -> dict[str, Any]:
    """What the work here was begun with, if it was."""
    path = out / "plan.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def agree(out: Path, plan: dict[str, Any]) -> None:
    """Note what the work here is begun with; refuse another plan than that."""
    plan = json.loads(json.dumps(plan))
    if not (old := begun(out)):
        write_json(out / "plan.json", plan)
    elif old != plan:
        differing = [name for name in plan if old.get(name) != plan[name]]
        sys.exit(
            f"{out} was begun with another {' and '.join(differing)}: "
            f"{ {name: old.get(name) for name in differing} }, not "
            f"{ {name: plan[name] for name in differing} }; give the same, or another --out"
        )


def refuse_to_renew(stage: Stage, todo: Sequence[Stage], out: Path) -> None:
    """Do not make again what others were made from: their results would say they are of it."""
    made = [other.name for other in todo if other.level > stage.level and other.begun()]
    if made and not stage.done():
        sys.exit(
            f"{stage.name} has to be made, but {', '.join(made)} in {out} were made from an "
            "earlier one; remove their results, or give another --out"
        )


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
