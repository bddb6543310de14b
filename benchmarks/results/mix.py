"""The questions of the project's own results: what is trained on and tested on.

Trains on HotpotQA's and 2Wiki's train rows but for some that are kept apart, on which settings may
be chosen, and tests on dev rows of HotpotQA, 2Wiki and MuSiQue, of which nothing is trained on.
Passages are those of all three sets.

    python -m benchmarks.results.mix runs/results/gpu --questions 100
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agentr1.rewards import normalize_answer
from agentr1.runs import write_json, write_text

TRAINED = ("hotpotqa", "2wiki")
TESTED = ("hotpotqa", "2wiki", "musique")
HELD_OUT = 200
"""Train rows that are not trained on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write `OUT/data`: train, dev, test, corpus and `mix.json`, which says what they are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results.mix", description=__doc__)
    parser.add_argument("out", type=Path, help="folder that holds the three sets")
    parser.add_argument("--questions", type=int, help="test so many of each set")
    options = parser.parse_args(argv)
    out, data = options.out, options.out / "data"
    tested = [
        row
        for name in TESTED
        for row in _shuffled(_rows(out / name / "dev.jsonl"))[: options.questions]
    ]
    asked = {normalize_answer(row["question"]) for row in tested}
    wanted = [row for name in TRAINED for row in _rows(out / name / "train.jsonl")]
    trained = _shuffled(row for row in wanted if normalize_answer(row["question"]) not in asked)
    parts = {"train": trained[HELD_OUT:], "dev": trained[:HELD_OUT], "test": _shuffled(tested)}
    for split, rows in parts.items():
        write_text(data / f"{split}.jsonl", "".join(_line(row) for row in rows))
    passages = _passages(out / name / "corpus.jsonl" for name in TESTED)
    write_text(data / "corpus.jsonl", "".join(map(_line, passages)))
    counts = {split: Counter(row["source"] for row in rows) for split, rows in parts.items()}
    overlap = len(wanted) - len(trained)
    write_json(
        data / "mix.json",
        {"rows": counts, "passages": len(passages), "trained_and_tested_left_out": overlap},
    )
    print({split: dict(count) for split, count in counts.items()}, f"{len(passages)} passages")
    return 0


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _passages(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Those of all files, each once.

    Raises:
        SystemExit: two that differ have one id.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        for passage in _rows(file):
            if found.setdefault(passage["id"], passage) != passage:
                sys.exit(f"{file}: another passage {passage['id']!r} is in an earlier corpus")
    return list(found.values())


def _shuffled(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """In an order that depends on the ids alone."""
    return sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).digest())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
