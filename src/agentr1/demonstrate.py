"""`agentr1 demonstrate`: the demonstrations of a recipe's training rows, for `agentr1 sft`.

Layer 7. Which rows may be used, how many, and what is told about the others; what a demonstration
is, `demonstrations.py` knows.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from agentr1.commandline import guarded, recipe_parser, split_arguments
from agentr1.demonstrations import (
    Demonstration,
    Demonstrator,
    Dropped,
    demonstration,
    demonstrator,
)
from agentr1.loops import finish
from agentr1.recipe import WITHOUT_TRAINING, Recipe, load_recipe
from agentr1.rewards import normalize_answer
from agentr1.task import build_task
from agentr1.types import Row

AT_ONCE = 32
"""Rows searched for at once; what comes of a row does not depend on it."""


def demonstrate(
    name: str,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    count: int | None = None,
    seed: int | None = None,
    think: bool = False,
) -> dict[str, int]:
    """Write the demonstrations of a recipe's training rows to a file.

    Args:
        name: recipe, see `recipe.find_recipe`; its environment must be a `ToolEnv` with a search.
        out: a `.jsonl` file, `{"id", "messages"}` a line; overwritten.
        overrides: of the recipe's keys.
        count: stop after so many; None for all that the rows give.
        seed: take the rows in an order drawn with it; None for that of the file. Nothing else is
            drawn.
        think: see `Demonstrator`.

    Returns:
        How many rows were kept, under "kept", and how many fell out, by reason.

    Raises:
        ValueError, FileNotFoundError: a mistake in the recipe or the command.
        RuntimeError: the search tool failed, or no row was kept.
    """
    if out.suffix != ".jsonl":
        raise ValueError(f"--out is {str(out)!r}, expected a file that ends in .jsonl")
    if count is not None and count < 1:
        raise ValueError(f"--n is {count}, expected 1 or more, or left out for all")
    recipe = load_recipe(name, [*WITHOUT_TRAINING, *overrides])
    # All rows of dev and test are looked at, to leave out what would be trained on and measured.
    arguments = dataclasses.replace(recipe.arguments, dev_limit=None, test_limit=None)
    task = build_task(arguments)
    held_out = {_asked(row) for row in (*task.dev, *task.test) if "question" in row}
    rows = list(task.train)
    if seed is not None:
        random.Random(seed).shuffle(rows)
    how = demonstrator(task.env_factory, _max_searches(recipe), think)
    kept, dropped = finish(_collect(rows, how, held_out, count))
    if not kept:
        raise RuntimeError(f"no row of {recipe.arguments.dataset} was kept: {_reasons(dropped)}")
    _write(out, kept)
    _report(out, kept, dropped)
    return {"kept": len(kept), **{str(reason): number for reason, number in dropped.items()}}


def _asked(row: Row) -> str:
    """A row's question but for case, articles and punctuation, as `agentr1 data` compares them."""
    question = str(row["question"])
    return normalize_answer(question) or question


async def _collect(
    rows: Sequence[Row], how: Demonstrator, held_out: set[str], count: int | None
) -> tuple[list[Demonstration], Counter[Dropped]]:
    """Demonstrations in the order of the rows, until there are enough."""
    kept: list[Demonstration] = []
    dropped: Counter[Dropped] = Counter()

    async def one(row: Row) -> Demonstration | Dropped:
        if str(row.get("official_split", "train")) != "train":
            return Dropped.NOT_TRAIN
        if _asked(row) in held_out:
            return Dropped.IN_TEST
        return await demonstration(row, how)

    for start in range(0, len(rows), AT_ONCE):
        for found in await asyncio.gather(*map(one, rows[start : start + AT_ONCE])):
            if isinstance(found, Dropped):
                dropped[found] += 1
            else:
                kept.append(found)
            if count is not None and len(kept) == count:
                return kept, dropped
        if sys.stderr.isatty():
            done = min(start + AT_ONCE, len(rows))
            print(f"\r{done} of {len(rows)} rows", end="", file=sys.stderr, flush=True)
    return kept, dropped


def _max_searches(recipe: Recipe) -> int:
    """Turns before the answer."""
    arguments = recipe.arguments
    limits = [recipe.training.limits.max_turns - 1, arguments.max_calls, arguments.tool_max_calls]
    return min(limit for limit in limits if limit is not None)


def _write(out: Path, kept: Sequence[Demonstration]) -> None:
    """All or nothing: a file that is half written would be trained on."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".jsonl.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for one in kept:
            line = {"id": one.row_id, "messages": one.messages}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(unfinished, out)


def _report(out: Path, kept: Sequence[Demonstration], dropped: Counter[Dropped]) -> None:
    searches = sorted(Counter(one.searches for one in kept).items())
    lengths = sorted(sum(len(str(m["content"])) for m in one.messages) for one in kept)
    print(f"\n{len(kept)} demonstrations in {out}, of {len(kept) + dropped.total()} rows looked at")
    print("searches: " + ", ".join(f"{number} in {rows} rows" for number, rows in searches))
    print(f"characters: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")
    if dropped:
        print(f"left out: {_reasons(dropped)}")


def _reasons(dropped: Counter[Dropped]) -> str:
    return "; ".join(f"{number} because {reason}" for reason, number in dropped.most_common())


def _only_train(split: str) -> str:
    if split != "train":
        raise argparse.ArgumentTypeError(
            f"{split!r} is refused: a policy that imitates dev or test rows would be measured on "
            "what it was trained on; demonstrations are made of train"
        )
    return split


def main(argv: Sequence[str] | None = None) -> int:
    """`agentr1 demonstrate RECIPE --out FILE [--n N] [--seed S] [--think] [--key value ...]`."""
    parser = recipe_parser("demonstrate", "Write ideal searches for a recipe's training rows.")
    parser.add_argument("--out", required=True, type=Path, help="file to write, .jsonl")
    parser.add_argument("--split", default="train", type=_only_train, help="train, and no other")
    parser.add_argument("--n", type=int, help="demonstrations to write; default: all there are")
    parser.add_argument("--seed", type=int, help="take the rows in an order drawn with it")
    parser.add_argument("--think", action="store_true", help="think in a sentence before acting")
    args, overrides = split_arguments(parser, argv)
    return guarded(
        lambda: demonstrate(
            args.recipe, args.out, overrides, count=args.n, seed=args.seed, think=args.think
        ),
        args.debug,
    )
