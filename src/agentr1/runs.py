"""The run folder: everything needed to explain, audit or continue a run, and nothing hidden.

Files are written aside and renamed, so a killed run leaves no half file under a real name. Knows
paths and JSON, no models. Layout:

    runs/<task>/<algorithm>/<time>/
        recipe.yaml  command.txt  environment.json  metrics.jsonl  eval.json
        trajectories/step_000010.jsonl  evaluation/after.jsonl  checkpoint-N/  final/
    runs/<task>/latest, runs/<task>/<algorithm>/latest   links to the newest
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from agentr1.scoring import Scored
from agentr1.types import Message, StopReason, Trajectory, Turn

SCHEMA_VERSION = 1
"""Of the lines in `trajectories/`."""
_PACKAGES = ("agentr1", "trl", "transformers", "torch", "peft", "accelerate", "deepspeed")


def new_run_folder(recipe_name: str, root: Path = Path("runs")) -> Path:
    """Make `root/recipe_name/<time>`; `latest` in each folder below root points there."""
    parent = root / recipe_name
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, extra = parent / stamp, 1
    while folder.exists():
        folder, extra = parent / f"{stamp}-{extra}", extra + 1
    folder.mkdir(parents=True)
    for above in folder.parents:
        if above == root:
            break
        aside = above / f".latest-{os.getpid()}"
        aside.symlink_to(folder.relative_to(above), target_is_directory=True)
        aside.replace(above / "latest")
    return folder


def newest_resumable(recipe_name: str, root: Path = Path("runs")) -> Path:
    """The newest run folder of a recipe that holds a checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    parent = root / recipe_name
    found = sorted(p.parent for p in parent.glob("*/checkpoint-*") if not p.parent.is_symlink())
    if not found:
        raise FileNotFoundError(
            f"--resume found no checkpoint under {parent}; start without --resume, or name the "
            "run's folder with --output_dir"
        )
    return found[-1]


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write pretty JSON in one piece."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_header(folder: Path, recipe_text: str, command: Sequence[str]) -> None:
    """Record what was asked for and what it ran on."""
    write_text(folder / "recipe.yaml", recipe_text)
    write_text(folder / "command.txt", shlex.join(command) + "\n")
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    record = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }
    write_json(folder / "environment.json", record)


def append_metrics(folder: Path, step: int, values: dict[str, Any]) -> None:
    """Add one line to `metrics.jsonl`."""
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


def drop_metrics_after(folder: Path, step: int) -> None:
    """Forget the lines of steps that a resumed run will do again."""
    path = folder / "metrics.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if _step_of(line) <= step))


def drop_results(folder: Path) -> None:
    """Forget the final test of a policy that is trained on: it says nothing of the next one."""
    for name in ("eval.json", "evaluation/after.json", "evaluation/after.jsonl"):
        (folder / name).unlink(missing_ok=True)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # the last line of a killed run may be cut
        return float("inf")


def write_trajectories(
    folder: Path, step: int, rank: int, trajectories: Iterable[Trajectory]
) -> Path:
    """Write one line per episode: messages, and every token with its logprob, turn by turn."""
    suffix = "" if rank == 0 else f".rank{rank}"
    path = folder / f"step_{step:06d}{suffix}.jsonl"
    records = ({"schema": SCHEMA_VERSION, **dataclasses.asdict(t)} for t in trajectories)
    write_text(
        path, "".join(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in records)
    )
    return path


def write_scores(path: Path, scored: Iterable[Scored]) -> None:
    """Write one line per evaluated row: its id, its metrics, the whole episode."""
    write_text(path, "".join(map(_score_line, scored)))


def append_scores(path: Path, scored: Iterable[Scored]) -> None:
    """Add lines as `write_scores` writes them; they are on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(map(_score_line, scored)))
        file.flush()
        os.fsync(file.fileno())


def _score_line(scored: Scored) -> str:
    record = {
        "schema": SCHEMA_VERSION,
        "id": scored.row_id,
        "values": dict(scored.values),
        "wall_seconds": scored.wall_seconds,
        "trajectory": dataclasses.asdict(scored.trajectory),
    }
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def stream_scores(path: Path) -> Iterator[Scored]:
    """Read evaluated rows back, one at a time, as they were written."""
    for record in _records(path):
        yield Scored(
            record["id"],
            record["values"],
            trajectory_of(record["trajectory"]),
            record.get("wall_seconds", 0.0),
        )


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # the last line of a killed run may be cut
                yield json.loads(line)


def trajectory_of(record: Mapping[str, Any]) -> Trajectory:
    """The episode that `dataclasses.asdict` and JSON made `record` of."""

    def messages(records: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
        return tuple(Message(**message) for message in records)

    turns = [
        turn
        | {name: tuple(turn[name]) for name in ("action_ids", "logprobs", "observation_ids")}
        | {"prompt_ids": None if turn["prompt_ids"] is None else tuple(turn["prompt_ids"])}
        | {"message": Message(**turn["message"]), "observation": messages(turn["observation"])}
        for turn in record["turns"]
    ]
    return Trajectory(
        row=record["row"],
        prompt=messages(record["prompt"]),
        turns=tuple(Turn(**turn) for turn in turns),
        stop_reason=StopReason(record["stop_reason"]),
        seconds=record["seconds"],
    )


def read_scores(path: Path, metric: str) -> dict[str, float]:
    """Read one metric of an evaluation back, row id to value.

    Raises:
        FileNotFoundError, ValueError: no such evaluation, or no such metric in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is {path.parent.parent} a finished run?")
    values: dict[str, float] = {}
    for record in _records(path):
        if metric not in record["values"]:
            known = sorted(record["values"])
            raise ValueError(f"{path} holds no metric {metric!r}, it has {known}")
        values[record["id"]] = record["values"][metric]
    return values
