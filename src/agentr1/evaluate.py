"""`agentr1 eval`: systems, a recipe's rows, and how well the ones answer the others.

Read `evaluate` top to bottom. Every system plays the same rows under the same budget, in batches
whose members are fixed by the rows' ids; each batch is written down when it is done, and the
report is made from what is written. So an evaluation can be stopped at any time and goes on where
it stood. The files are those of a training run's final test: `agentr1 compare` reads both.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agentr1 import rewards
from agentr1.ceiling import ceiling_of
from agentr1.commandline import guarded, recipe_parser, split_arguments
from agentr1.eval_folder import (
    EvalFolder,
    digest_of_rows,
    fingerprint,
    fingerprint_of_corpus,
    newest_evaluation,
)
from agentr1.eval_report import plot, report_of, show
from agentr1.recipe import Recipe, find_path
from agentr1.runs import append_scores, new_run_folder, stream_scores, write_header, write_json
from agentr1.scoring import Metric, Scored, evaluate_rows, outcome
from agentr1.systems import (
    SYSTEMS,
    Player,
    System,
    budget_of,
    choose,
    corpus_of,
    device_of,
    load_weights,
    player,
    prepare,
    search_of,
)
from agentr1.task import Task
from agentr1.types import Row

AT_ONCE = 64
"""Questions of a batch: what an interrupt costs at most, and what is in memory at once."""

_STANDARD: dict[str, Metric] = {
    "exact_match": rewards.exact_match_reward,
    "cover_exact_match": rewards.cover_exact_match_reward,
    "f1": rewards.f1_reward,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How to evaluate.

    Attributes:
        split: train, dev or test.
        limit: at most so many rows, instead of the recipe's limit; which ones depends on the ids
            of all rows of the split alone.
        baselines: names of `SYSTEMS`, or "all".
        cold_start: the model of the system of that name; see `systems.find_policy`.
        out: folder; one that was begun goes on. None for a new one under runs/eval.
        resume: go on in the newest folder of the recipe.
        sample: temperature; 0 is greedy.
        at_once: questions of a batch.
    """

    split: str = "test"
    limit: int | None = None
    baselines: Sequence[str] = ()
    cold_start: str | None = None
    out: Path | None = None
    resume: bool = False
    sample: float = 0.0
    at_once: int = AT_ONCE

    def __post_init__(self) -> None:
        if self.at_once < 1 or self.sample < 0:
            raise ValueError(
                f"--at-once must be 1 or more and --sample 0 or more, got {self.at_once} and "
                f"{self.sample}"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be 1 or more, got {self.limit}")
        if self.resume and self.out is not None:
            raise ValueError(
                f"--resume goes on in the newest folder, --out {self.out} names one; give one of "
                "them (a folder that --out names goes on by itself)"
            )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What every system of one evaluation shares.

    Attributes:
        rows: in the order in which they are played.
        metrics: the recipe's, then exact match, cover-EM and F1 where rows have answers.
    """

    recipe: Recipe
    task: Task
    rows: Sequence[Row]
    metrics: Mapping[str, Metric]
    folder: EvalFolder
    options: Options

    @property
    def split(self) -> str:
        """That the rows are of: dev where test was asked for and the data set has none."""
        return self.task.tested if self.options.split == "test" else self.options.split

    @property
    def ids(self) -> list[str]:
        """Of the rows, in their order."""
        return [str(row["id"]) for row in self.rows]


def evaluate(
    name: str,
    overrides: Sequence[str] = (),
    policy: str | None = None,
    options: Options | None = None,
) -> Path:
    """Evaluate a policy, and baselines beside it; print the tables and keep everything.

    Args:
        name: recipe.
        overrides: of the recipe's keys.
        policy: see `systems.find_policy`.
        options: which rows, systems and folder.

    Returns:
        The folder with `eval.json` and `evaluation/*.jsonl`.

    Raises:
        ValueError, FileNotFoundError: a mistake in the recipe or the command, or a folder that was
            begun with other settings.
        RuntimeError: too many faults of the infrastructure, or another process is at work in the
            folder.
        KeyboardInterrupt: with how to go on.
    """
    options = options or Options()
    whole = options.split if options.limit is not None else None
    recipe, task = prepare(name, overrides, whole)
    systems, left_out = choose(recipe, task, options.baselines, policy, options.cold_start)
    rows = drawn(getattr(task, options.split), options.limit)
    answered = all(row.get("answers") for row in rows)
    metrics = {**task.metrics, **(_STANDARD if answered else {}), **task.metrics}
    folder = EvalFolder(_folder(recipe, options))
    evaluation = Evaluation(recipe, task, rows, metrics, folder, options)
    settings = {system.name: _settings(evaluation, system) for system in systems}
    folder.check(settings)
    with folder.alone():
        folder.accept(settings)  # another process may have begun there meanwhile
        if not (folder.path / "recipe.yaml").exists():
            write_header(folder.path, recipe.text, ["agentr1", *sys.argv[1:]])
        print("\n".join([f"budget of each system: {budget_of(recipe)}", *left_out]))
        try:
            for source in dict.fromkeys(system.source for system in systems):
                _play(evaluation, [system for system in systems if system.source == source])
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; the same command with --out {folder.path} goes on where it stood"
            ) from None
        _report(evaluation)
    return folder.path


def drawn(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """At most so many rows, the same whatever the order of the file, in the order of their ids."""
    by_chance = sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    return sorted(by_chance[:limit], key=lambda row: row["id"])


def _folder(recipe: Recipe, options: Options) -> Path:
    if options.out is not None:
        return options.out
    return (
        newest_evaluation(recipe.name) if options.resume else new_run_folder(f"eval/{recipe.name}")
    )


def _settings(evaluation: Evaluation, system: System) -> dict[str, Any]:
    """Everything that a system's scores depend on, as far as it has a name."""
    recipe, options = evaluation.recipe, evaluation.options
    arguments = dataclasses.asdict(recipe.arguments)
    for name in ("train_limit", "dev_limit", "test_limit", "dataset", "corpus", "demonstrations"):
        del arguments[name]  # what they name is compared, wherever it lies
    place, shown = corpus_of(recipe, evaluation.task), recipe.arguments.demonstrations
    model = system.source.path_or_id
    weights = fingerprint(model)
    return {
        "recipe": recipe.name,
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "weights": weights,
        "untrained": None if system.name in ("policy", "cold_start") else weights,
        "rows": f"{len(evaluation.rows)} of {evaluation.split}, {digest_of_rows(evaluation.rows)}",
        "corpus": None if place is None else fingerprint_of_corpus(place),
        "demonstrations": fingerprint(find_path(shown, "demonstrations"))
        if shown is not None and system.name == "few_shot"
        else None,
        "sample": options.sample,
        "at_once": options.at_once,
        "max_slots": recipe.training.max_slots,
        "dtype": str(recipe.model.dtype),
        "device": device_of(recipe),
        "arguments": arguments,
        "limits": dataclasses.asdict(recipe.training.limits),
    }


def _play(evaluation: Evaluation, systems: Sequence[System]) -> None:
    """Play what is missing of systems with the same weights, which are loaded once, if at all."""
    ids, at_once = evaluation.ids, evaluation.options.at_once
    done = {s.name: evaluation.folder.done(s.name, ids, at_once) for s in systems}
    missing = [name for name, count in done.items() if count < len(ids)]
    if not missing:
        return
    weights = load_weights(systems[0].source, evaluation.recipe)
    for name in missing:
        ready = player(name, evaluation.recipe, evaluation.task, weights)
        _play_system(evaluation, name, ready, done[name])
        ready.engine.release()
    del weights
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _play_system(evaluation: Evaluation, name: str, ready: Player, done: int) -> None:
    rows, at_once = evaluation.rows, evaluation.options.at_once
    with _bar() as bar:
        shown = bar.add_task(name, total=len(rows), completed=done)
        for start in range(done, len(rows), at_once):
            scored = evaluate_rows(
                rows[start : start + at_once],
                ready.task.env_factory,
                ready.codec,
                ready.engine,
                limits=ready.limits,
                metrics=evaluation.metrics,
                temperature=evaluation.options.sample,
                ended=lambda: bar.advance(shown),
            )
            _check_faults(scored, name, evaluation)
            append_scores(evaluation.folder.transcripts(name), scored)


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, transient=True)
    progress.disable = not progress.console.is_terminal
    return progress


def _check_faults(scored: Sequence[Scored], name: str, evaluation: Evaluation) -> None:
    """Stop rather than score a policy by our own failures; the batch is not kept."""
    faults = [turn.fault for s in scored for turn in s.trajectory.turns if turn.fault is not None]
    turns = sum(len(s.trajectory.turns) for s in scored)
    allowed = evaluation.recipe.training.max_fault_share
    if len(faults) > allowed * turns:
        raise RuntimeError(
            f"{name}: {len(faults)} of {turns} turns met an infrastructure fault, more than "
            f"max_fault_share={allowed}: {faults[0]}; check the tools' servers, then the same "
            f"command with --out {evaluation.folder.path} goes on"
        )


def _report(evaluation: Evaluation) -> None:
    """Make the report from the transcripts of all systems that are complete in the folder."""
    folder, recipe, options = evaluation.folder, evaluation.recipe, evaluation.options
    settings = folder.settings()
    ids = evaluation.ids
    outcomes = {
        name: [outcome(scored) for scored in stream_scores(folder.transcripts(name))]
        for name in SYSTEMS
        if name in settings and folder.done(name, ids, options.at_once) == len(ids)
    }
    about = {
        "recipe": recipe.name,
        "split": evaluation.split,
        "n": len(evaluation.rows),
        "sample": options.sample,
        "budget": budget_of(recipe)._asdict(),
        "models": {name: settings[name]["model"] for name in outcomes},
    }
    place, search = corpus_of(recipe, evaluation.task), search_of(evaluation.task)
    ceiling = ceiling_of(place, evaluation.rows, search and search.passage_chars)
    report = report_of(outcomes, ceiling, about)
    write_json(folder.path / "eval.json", report)
    show(report, f"{recipe.name} on {evaluation.split}, n={len(evaluation.rows)}")
    if not plot(report, folder.path / "eval"):
        print("no plot: matplotlib is not installed; pip install 'agentr1[plot]'")
    print(f"eval.json, transcripts and plot: {folder.path}")


def main(argv: Sequence[str] | None = None) -> int:
    """`agentr1 eval RECIPE [--model M] [--baselines all|NAME ...] [--limit N] [--out DIR] ...`."""
    parser = recipe_parser("eval", "Evaluate a policy, and baselines beside it.")
    add = parser.add_argument
    add("--model", help="the policy: model id or folder, adapter, or run folder")
    add("--split", default="test", choices=["train", "dev", "test"], help="(%(default)s)")
    add("--limit", type=int, help="at most so many rows, drawn by their ids")
    add("--baselines", nargs="+", default=(), metavar="NAME", help=f"all, or of {_names()}")
    add("--cold-start", metavar="MODEL", help="the policy of the system cold_start")
    add("--out", type=Path, help="folder; an evaluation that was begun there goes on")
    add("--resume", action="store_true", help="go on in the recipe's newest evaluation")
    add("--sample", type=float, default=0.0, metavar="T", help="temperature, 0 is greedy")
    add("--at-once", type=int, default=AT_ONCE, help="questions of a batch (%(default)s)")
    args, overrides = split_arguments(parser, argv)
    return guarded(lambda: evaluate(args.recipe, overrides, args.model, _options(args)), args.debug)


def _names() -> list[str]:
    return [name for name in SYSTEMS if name != "policy"]


def _options(args: argparse.Namespace) -> Options:
    names = [field.name for field in dataclasses.fields(Options)]
    return Options(**{name: getattr(args, name) for name in names})
