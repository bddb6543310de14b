"""`agentr1 index`: build an index folder of a corpus, and say how good an index is for questions.

    agentr1 index corpus.jsonl.gz --kind bm25 --out indexes/hotpot
    agentr1 index indexes/hotpot --questions data/hotpot/dev.jsonl --k 1 5 10

Layer 7. The first form may measure as well; either way the numbers go into the folder's
`quality.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from agentr1.commandline import add_debug, guarded
from agentr1.data import load_rows
from agentr1.retrieval.base import LONG
from agentr1.retrieval.build import LAYOUTS, IndexSettings, build_index
from agentr1.retrieval.encoders import DEFAULT
from agentr1.retrieval.manifest import KINDS
from agentr1.retrieval.memory import Need, gigabytes
from agentr1.retrieval.opening import open_index
from agentr1.retrieval.quality import answers_in, coverage, has_support, recall, summary
from agentr1.runs import write_json

_QUALITY = "quality.json"
_COUNTS = {"questions": "questions", "with support": "with_support", "yes/no": "yes_no"}
_SHARES = {"answer in corpus": "answer_coverage", "ceiling": "ceiling"}
_BY_K = {"recall@{}": "recall", "all@{}": "all_found"}
"""Words of the table, and where `quality.summary` puts the numbers."""


def build(corpus: Path, folder: Path, settings: IndexSettings) -> None:
    """Build an index and say what it takes; see `retrieval.build.build_index`."""
    manifest = build_index(corpus, folder, settings, lambda *numbers: _announce(corpus, *numbers))
    stored = manifest.stages["passages"]
    size = sum(manifest.files.values())
    print(f"{folder}: {manifest.kind}, {manifest.passages:,} passages, {gigabytes(size)}")
    if stored["long"]:
        print(
            f"note: {stored['long']:,} passages have {LONG:,} characters or more, the longest "
            f"{stored['longest']:,}; words count all of a passage, an encoder reads only its "
            "beginning, and a search shows it whole unless `passage_chars` cuts it"
        )


def load_questions(paths: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Read files of rows, by folder and name: "hotpotqa/dev".

    Raises:
        FileNotFoundError, ValueError: see `data.load_rows`; or two have the same name.
    """
    files: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
        name = f"{path.absolute().parent.name}/{stem}"
        if name in files:
            raise ValueError(f"two files of questions are called {name}: measure them one by one")
        files[name] = load_rows(path)
    return files


def measure(
    folder: Path, files: Mapping[str, list[dict[str, Any]]], ks: Sequence[int]
) -> dict[str, Any]:
    """Measure an index on questions, print a table and keep the numbers.

    Args:
        folder: of the index.
        files: from `load_questions`.
        ks: how many hits recall looks at.

    Returns:
        What `quality.json` holds of these files, by their names.

    Raises:
        FileNotFoundError, ValueError: from opening the index.
    """
    index = open_index(folder)
    before = _measured(folder / _QUALITY)
    bar = tqdm(index.passages, "answers", unit="passage", mininterval=1)
    found = answers_in(bar, [row for rows in files.values() for row in rows])
    records = {}
    for name, rows in files.items():
        measured = recall(index, rows, sorted(set(ks))) if has_support(rows) else None
        records[name] = summary(measured, coverage(rows, found))
    write_json(folder / _QUALITY, before | records)
    Console().print(_table(str(folder), records))
    return records


def _measured(path: Path) -> dict[str, Any]:
    """What was measured before."""
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}): remove it") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is broken, expected one object: remove it")
    return record


def _announce(corpus: Path, need: Need, available: int | None) -> None:
    there = "what is available is not known" if available is None else gigabytes(available)
    print(
        f"{corpus.name}: about {need.passages:,} passages; building needs about "
        f"{gigabytes(need.memory)} of memory (available: {there}) and {gigabytes(need.disk)} of "
        "disk",
        file=sys.stderr,
    )


def _table(title: str, records: dict[str, Any]) -> Table:
    """One column a file: the measures have the longer names."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for name in records:
        table.add_column(name, justify="right")
    for label, key in _COUNTS.items():
        table.add_row(label, *(str(record.get(key, 0)) for record in records.values()))
    for label, key in _SHARES.items():
        table.add_row(label, *(f"{record[key]:.3f}" for record in records.values()))
    for label, key in _BY_K.items():
        for k in dict.fromkeys(k for record in records.values() for k in record.get(key, ())):
            values = [record.get(key, {}).get(k) for record in records.values()]
            table.add_row(label.format(k), *("-" if v is None else f"{v:.3f}" for v in values))
    table.caption = (
        "answer in corpus: of the questions not answered by yes or no; ceiling: of all, that or "
        "yes/no. recall@k: share of the supporting passages among the first k of one query, the "
        "question itself; all@k: questions with all of them there"
    )
    return table


def _index(args: argparse.Namespace) -> None:
    place: Path = args.place
    if min(args.k) < 1:
        raise ValueError(f"--k: expected values of at least 1, got {args.k}")
    files = load_questions(args.questions)  # before the hours that a build may take
    if place.is_dir():
        if args.out is not None or not files:
            raise ValueError(
                f"{place} is a folder: `agentr1 index {place} --questions FILE` measures an index; "
                "to build one, name a corpus file and --out"
            )
        measure(place, files, args.k)
        return
    if args.out is None:
        raise ValueError(f"where to? `agentr1 index {place} --kind {args.kind} --out DIR`")
    names = ("kind", "encoder", "query_prefix", "passage_prefix", "layout")
    build(place, args.out, IndexSettings(**{name: getattr(args, name) for name in names}))
    if files:
        measure(args.out, files, args.k)


def main(argv: Sequence[str] | None = None) -> int:
    """`agentr1 index CORPUS --kind bm25 --out DIR`, `agentr1 index DIR --questions FILE`."""
    parser = argparse.ArgumentParser(
        prog="agentr1 index",
        description="Build an index of a corpus, or measure one; the same command goes on with an "
        "interrupted build.",
        allow_abbrev=False,
    )
    parser.add_argument("place", type=Path, metavar="CORPUS", help="passages, or an index folder")
    parser.add_argument("--kind", choices=KINDS, default="bm25", help="(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the index")
    parser.add_argument(
        "--encoder", default=DEFAULT, metavar="LIBRARY:MODEL", help="of embeddings (%(default)s)"
    )
    parser.add_argument("--query-prefix", default="", help='"query: " for models of the E5 kind')
    parser.add_argument("--passage-prefix", default="", help='"passage: " for these')
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="auto", help="of embeddings (%(default)s)"
    )
    parser.add_argument("--questions", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument(
        "--k", type=int, nargs="+", default=[1, 3, 5, 10], help="of recall@k (1 3 5 10)"
    )
    add_debug(parser)
    args = parser.parse_args(argv)
    return guarded(lambda: _index(args), args.debug)
