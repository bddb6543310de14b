"""All benchmarks, each in a process of its own, one after another: `make bench`.

Writes one result file per run and prints one table at the end. Exits 1 where a target is missed or
a benchmark fails.

    python -m benchmarks
    python -m benchmarks --only scheduling prefill
    python -m benchmarks --thorough
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agentr1.models import resolve_model
from agentr1.recipe import search_roots
from benchmarks.comparison import Comparison, table
from benchmarks.work import SMOLLM2

ROOT = Path(__file__).resolve().parents[1]


class Run(NamedTuple):
    """One process."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    timed_against_theirs: bool = False


SMOLLM2_RUN = "rollout_smollm2"
RUNS = (
    Run("scheduling", "scheduling"),
    Run("prefill", "prefill"),
    Run("train_phase", "train_phase"),
    Run("memory", "memory"),
    Run("rollout", "rollout", timed_against_theirs=True),
    Run(
        SMOLLM2_RUN,
        "rollout",
        ("--policy", SMOLLM2, "--latency", "0", "0.5", "--repeats", "3"),
        timed_against_theirs=True,
    ),
    Run("heavy_tail", "heavy_tail", ("--repeats", "3"), timed_against_theirs=True),
    Run("gpu", "gpu"),
    Run("bias", "bias"),
    Run("credit", "credit"),
    Run("data_memory", "data_memory"),
    Run("retriever", "retriever"),
)
THOROUGH = ("--repeats", "5", "--patience", "inf")
"""As many runs of each side as the median is said to be of, however long they take."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and return 1 where a target is missed or a benchmark fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", default="runs/bench", help="folder for the result files")
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS], metavar="NAME")
    parser.add_argument(
        "--thorough",
        action="store_true",
        help="repeat the other side as often as ours, which takes more than an hour",
    )
    options = parser.parse_args(argv)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[Comparison] = []
    failed: list[str] = []
    for run in RUNS:
        if options.only and run.name not in options.only:
            continue
        if run.name == SMOLLM2_RUN and (missing := _missing(SMOLLM2)):
            print(f"=== {run.name} skipped: {missing}", flush=True)
            continue
        result = folder / f"{run.name}.json"
        result.unlink(missing_ok=True)  # a failed run must not leave an older one's numbers
        start = time.perf_counter()
        extra = THOROUGH if options.thorough and run.timed_against_theirs else ()
        code = play(run, result, extra)
        print(f"=== {run.name} took {time.perf_counter() - start:.0f} s", flush=True)
        if code not in (0, 1) or not result.exists():
            failed.append(f"{run.name} (exit code {code})")
        else:
            lines += map(from_file, json.loads(result.read_text(encoding="utf-8")))
    print(f"\n{table(lines)}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed) or any(line.reached is False for line in lines))


def play(run: Run, result: Path, extra: Sequence[str] = ()) -> int:
    """Run one benchmark in its own process; its exit code."""
    print(f"\n=== {run.name}", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{run.module}", *run.arguments, *extra]
    done = subprocess.run([*command, "--json", str(result.resolve())], cwd=ROOT, check=False)
    return done.returncode


def from_file(line: dict[str, Any]) -> Comparison:
    """A line of a result file as it was before it was written."""
    measure = next(key.removeprefix("ours_") for key in line if key.startswith("ours_"))
    return Comparison(
        line["name"],
        line["value"],
        line["workload"],
        unit=line["unit"],
        target=line["target"],
        direction=line["direction"],
        ours=line[f"ours_{measure}"],
        theirs=line[f"theirs_{measure}"],
        measure=measure,
        note=line["note"],
    )


def _missing(model: str) -> str:
    """Why a model cannot be loaded here, or ""."""
    try:
        resolve_model(model, search_roots())
    except FileNotFoundError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(main())
