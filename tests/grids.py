"""What the tests of grids share: a quick program in the place of `agentr1`, finished runs."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from agentr1.cells import Run
from agentr1.runs import write_json, write_scores, write_text
from agentr1.scoring import Scored
from agentr1.types import Message, StopReason, Trajectory, Turn

RECIPE = "algorithm: grpo # compares\nmax_steps: 4\n"
FAKE = '''\
"""`fake train RECIPE [--do WHAT] --output_dir FOLDER [--resume]`: a run of four steps."""
import json, pathlib, shlex, signal, sys, time

words = sys.argv[1:]
resumed = words[-1] == "--resume"
words = words[:-1] if resumed else words
folder = pathlib.Path(words[words.index("--output_dir") + 1])
what = words[words.index("--do") + 1] if "--do" in words else "nothing"
folder.mkdir(parents=True, exist_ok=True)
(folder / "recipe.yaml").write_text(pathlib.Path(words[1]).read_text())
(folder / "command.txt").write_text(shlex.join(["agentr1", *words]) + "\\n")
started = time.time()


def checkpoint(step):
    place = folder / f"checkpoint-{step}"
    place.mkdir(exist_ok=True)
    state = {"global_step": step, "max_steps": 4}
    (place / "trainer_state.json").write_text(json.dumps(state))


def stopped(number, frame):
    checkpoint(2)
    print("saved", flush=True)
    sys.exit(130)


if what == "fail":
    print("\\n".join(f"line {i}" for i in range(40)))
    print("bar 1\\rbar 2\\rno such tool", flush=True)
    sys.exit(3)
if what == "vanish":
    sys.exit(0)
if what in ("wait", "hang") and not resumed:
    signal.signal(signal.SIGTERM, stopped if what == "wait" else signal.SIG_IGN)
    (folder / "metrics.jsonl").write_text('{"step": 1}\\n')
    time.sleep(60)
if what == "late" and not resumed:  # killed in its final test
    checkpoint(4)
    (folder / "metrics.jsonl").write_text('{"step": 1}\\n')
    time.sleep(60)
if what.startswith("nap"):
    time.sleep(float(what[3:] or 0.5))
times = {"started": started, "ended": time.time(), "resumed": resumed}
(folder / "eval.json").write_text(json.dumps({"before": {}, "after": {}, **times}))
'''


def fake_program(folder: Path) -> tuple[str, ...]:
    """The command that stands for `agentr1`."""
    script = folder / "fake.py"
    script.write_text(FAKE)
    return (sys.executable, str(script))


def make_run(folder: Path, name: str, *overrides: str) -> Run:
    """A run below the folder, of a recipe beside it."""
    recipe = folder / "r.yaml"
    recipe.write_text(RECIPE)
    return Run(name, folder / "out" / name, str(recipe), RECIPE, overrides, steps=4)


def finish_run(
    run: Run,
    before: Mapping[str, float],
    after: Mapping[str, float],
    seconds: float = 100.0,
    metric: str = "exact_match",
) -> None:
    """Leave what `agentr1 train` leaves, with these values by row id."""
    turn = Turn((2,), (-1.0,), Message("assistant", "x"), prompt_ids=(1,))
    episode = Trajectory({}, (Message("user", "?"),), (turn,), StopReason.ENVIRONMENT)
    for moment, values in (("before", before), ("after", after)):
        scored = [Scored(row_id, {metric: value}, episode) for row_id, value in values.items()]
        write_scores(run.folder / "evaluation" / f"{moment}.jsonl", scored)
    write_text(run.folder / "recipe.yaml", run.text)
    write_text(run.folder / "command.txt", shlex.join(["agentr1", *run.arguments]) + "\n")
    write_json(run.folder / "environment.json", {"cpus": 2, "versions": {"trl": "1.16.0"}})
    write_json(run.folder / "eval.json", {"before": {}, "after": {}, "seconds": seconds})
    run.log.write_text("$ agentr1 train\n")


def evaluation_of(run: Run) -> dict[str, float]:
    """What the fake left as its evaluation."""
    return json.loads((run.folder / "eval.json").read_text())
