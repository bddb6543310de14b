"""`agentr1 data`: a published question set as a folder to train, to index and to evaluate with.

Records come from the Hub, from official files or from rows of this project, one at a time; passages
are written once each, training questions that dev or test also ask are left out, and a card says
what was done. What is remembered of a passage is some bytes, whatever its length. Knows neither
recipes nor models, and imports nothing heavy.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from agentr1.commandline import add_debug, guarded
from agentr1.retrieval.base import LONG
from agentr1.rewards import normalize_answer
from agentr1.sources import own
from agentr1.sources.base import Question
from agentr1.sources.card import REASONS, notes, readme
from agentr1.sources.folder import (
    CARD,
    CORPUS,
    README,
    SCHEMA,
    Staging,
    is_being_written,
    read_card,
)
from agentr1.sources.hub import read_hub
from agentr1.sources.passages import Digests, PassageFile, digest
from agentr1.sources.plan import HUB, Part, plan, refuse_own_input, requests, still_missing
from agentr1.sources.records import read_records
from agentr1.sources.sample import Sample, mixed
from agentr1.sources.table import DATA_SETS, MIX, MIX_ROWS, NAMES, SPLITS
from agentr1.sources.tally import RowFile
from agentr1.sources.twowiki import aliases_of


def prepare(
    name: str,
    out: Path,
    *,
    splits: Sequence[str] = (),
    n: int | None = None,
    seed: int = 0,
    source: str = HUB,
    force: bool = False,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a data set's folder, or add splits to it; nothing where it is there already.

    Args:
        name: of `NAMES`.
        out: the folder.
        splits: some of `SPLITS`; those that are there if empty.
        n: questions to draw from each split (of `agent-r1`: from each train split); all if None.
        seed: of the drawing.
        source: `hub`, or a folder or file.
        force: replace what the folder holds.
        command: as typed, for the card.

    Returns:
        The card.

    Raises:
        ValueError, OSError, RuntimeError: with the place, what was expected and the way out.
    """
    if n is not None and n < 1:
        raise ValueError(f"--n must be at least 1, or left out for all questions, got {n}")
    parts = plan(name, splits, n, source)
    refuse_own_input(out, parts)
    asked = requests(parts, seed)
    if not force and not is_being_written(out):
        old = read_card(out)
        if old is not None and not still_missing(out, old, name, asked):
            return old
    with Staging(out) as staging:
        # Asked again: another command may have come this far before the lock was ours.
        old = None if force else read_card(out)
        if old is not None:
            missing = still_missing(out, old, name, asked)
            if not missing:
                return old
            parts = [part for part in parts if part.split in missing]
        done, corpus = _write(staging, parts, old, seed)
        for split in {part.split for part in parts}:
            done[split] |= asked[split]
        if "train" in done:
            done["train"] |= {"overlap_checked": len(done) > 1}
        card = {
            "schema": SCHEMA,
            "name": name,
            "agentr1": _version(),
            "licences": _licences(done),
            "splits": done,
            "corpus": corpus,
            "commands": [*(old["commands"] if old else ()), shlex.join(["agentr1", *command])],
        }
        text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
        staging.path(CARD).write_text(text, encoding="utf-8")
        staging.path(README).write_text(readme(card), encoding="utf-8")
        staging.publish(replace=force)
    return card


class Writing:
    """What one split leaves for the next: the corpus being written, and the questions held out.

    Args:
        passages: receives the passages.
    """

    def __init__(self, passages: PassageFile) -> None:
        self.passages = passages
        self._held_out = Digests()
        self._corpora: set[Path] = set()

    def hold_out(self, question: str) -> None:
        """Remember a question of dev or test."""
        self._held_out.add(_key(question))

    def is_held_out(self, question: str) -> bool:
        """Whether dev or test asks the same, but for case, articles and punctuation."""
        return _key(question) in self._held_out

    def add_corpus(self, path: Path | None) -> None:
        """Write the passages of a corpus, once."""
        if path is not None and path not in self._corpora:
            self._corpora.add(path)
            self.passages.add_file(path)

    def row(self, question: Question, part: Part, number: int, place: str) -> dict[str, Any]:
        """A question as a row, its passages written.

        Raises:
            ValueError: it names a passage that its corpus does not have.
        """
        ids = [self.passages.add(passage) for passage in question.passages]
        titles = question.supporting_titles
        columns = {
            "id": question.id or f"{part.name}_{part.split}_{number}",
            "question": question.question,
            "answers": list(question.answers),
            "type": question.type,
            "hops": question.hops,
            "level": question.level,
            "supporting_titles": None if titles is None else list(titles),
            # Some of them alone would make finding those look like finding all.
            "gold_ids": [ids[at] for at in question.gold] if question.has_all_gold else None,
            "source": part.name,
        }
        row = {k: v for k, v in columns.items() if v is not None} | dict(question.more)
        absent = [i for i in row.get("gold_ids") or () if i not in self.passages]
        if part.corpus is not None and absent:
            raise ValueError(
                f"{place}: 'gold_ids' names {absent[0]!r}, which no passage of {part.corpus} has; "
                "put the corpus that belongs to these rows beside them, or drop the id"
            )
        return row


def _write(
    staging: Staging, parts: Sequence[Part], old: Mapping[str, Any] | None, seed: int
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Write rows and passages aside; the splits and the corpus for the card."""
    done: dict[str, Any] = dict(old["splits"]) if old else {}
    with PassageFile(staging.path(CORPUS)) as passages:
        writing = Writing(passages)
        if old and old["corpus"]:
            passages.add_file(staging.folder / CORPUS)
        for split in done.keys() - {"train"}:
            for row in _rows(staging.folder, split):
                writing.hold_out(row["question"])
        for split in dict.fromkeys(part.split for part in parts):
            with RowFile(staging.path(f"{split}.jsonl")) as rows:
                _write_split(rows, writing, [p for p in parts if p.split == split], seed)
                done[split] = rows.record()
        if old and "train" in old["splits"]:
            done["train"] = done["train"] | _without_held_out(staging, writing, done["train"])
        corpus = _corpus_record(passages, old)
    if corpus is None:
        passages.path.unlink()
    return done, corpus


def _write_split(rows: RowFile, writing: Writing, parts: Sequence[Part], seed: int) -> None:
    """Write one split of one or several data sets."""
    ids = Digests()
    samples = {part.name: Sample(part.n, seed, part.name) for part in parts if part.n}
    left: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for part in parts:
        writing.add_corpus(part.corpus)
    for part, place, row in _by_turns(rows, writing, parts):
        left[part.name][_counted_as(row, part.name)] += 1
        if not ids.add(digest(row["id"])):
            raise ValueError(
                f"{place}: id {row['id']!r} is that of an earlier question of {part.split}; "
                "ids tell rows apart, make them unique"
            )
        if part.name in samples:
            samples[part.name].offer(row)
        else:
            rows.add(row, _counted_as(row, part.name))
    for part in parts:
        _check_count(part, rows, left[part.name].total())
    offered = sum((left[name] for name in samples), Counter[str]())
    for name, row in mixed(samples.values()):
        rows.add(row, _counted_as(row, name))
    for name, count in offered.items():
        rows.left_out[name]["not_sampled"] = count - rows.written[name]


def _by_turns(
    rows: RowFile, writing: Writing, parts: Sequence[Part]
) -> Iterator[tuple[Part, str, dict[str, Any]]]:
    """The rows of all parts in turn, so that the first rows of a split are of every data set."""
    running = [(part, _wanted(rows, writing, part)) for part in parts]
    while running:
        for part, wanted in tuple(running):
            if (found := next(wanted, None)) is None:
                running.remove((part, wanted))
            else:
                yield part, *found


def _wanted(rows: RowFile, writing: Writing, part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a part that may be written; the others are counted."""
    progress = tqdm(_records(part), desc=f"{part.name} {part.split}", unit="q", disable=None)
    for number, (place, record) in enumerate(progress):
        read = own.read if own.is_own(record) else DATA_SETS[part.name].read
        question = read(record, place)
        row = writing.row(question, part, number, place)
        name = _counted_as(row, part.name)
        rows.read[name] += 1
        left_out = rows.left_out[name]
        if not question.answerable:
            left_out["unanswerable"] += 1
        elif not question.answers:
            left_out["no_answer"] += 1
        elif part.split == "train" and writing.is_held_out(question.question):
            left_out["overlap"] += 1
        else:
            if part.split != "train":
                writing.hold_out(question.question)
            yield place, row


def _records(part: Part) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not part.files:
        yield from read_hub(DATA_SETS[part.name], part.split)
    aliases = (
        dict(aliases_of(r, at) for at, r in read_records(part.aliases)) if part.aliases else {}
    )
    for path in part.files:
        for place, record in read_records(path):
            further = aliases.get(str(record.get("answer_id")))
            yield place, {**record, "answer_aliases": further} if further else record


def _check_count(part: Part, rows: RowFile, left: int) -> None:
    out = ", ".join(f"{c:,} {REASONS[reason]}" for reason, c in rows.left_out[part.name].items())
    read = f"{rows.read[part.name]:,} questions of {part.name} {part.split} were read"
    told = f"{read}, left out: {out}" if out else read
    if left == 0:
        where = ", ".join(map(str, part.files)) or "the Hub"
        raise ValueError(f"{where} gives no row: {told}; expected at least one with an answer")
    if part.n is not None and left < part.n:
        raise ValueError(
            f"{part.n:,} questions are wanted and only {left:,} are there: {told}; give --n {left} "
            "or less"
        )


def _without_held_out(
    staging: Staging, writing: Writing, train: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the folder's older train split again without what a new dev or test split asks."""
    with RowFile(staging.path("train.jsonl")) as rows:
        for name, counts in train["sources"].items():
            rows.read[name] = counts["read"]
            rows.left_out[name].update(counts["left_out"])
        of_part, *_ = train["sources"]
        for row in _rows(staging.folder, "train"):
            name = _counted_as(row, of_part)
            if writing.is_held_out(row["question"]):
                rows.left_out[name]["overlap"] += 1
            else:
                rows.add(row, name)
        if not len(rows):
            raise ValueError(f"every train question of {staging.folder} is asked in the new split")
        return rows.record()


def _corpus_record(passages: PassageFile, old: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not len(passages):
        return None
    before = (old or {}).get("corpus") or {}
    return passages.stamp() | {
        "passages": len(passages),
        "characters": passages.characters,
        "longest": passages.longest,
        "long": passages.long,
        "repeated": passages.repeated + before.get("repeated", 0),
        "empty": passages.empty + before.get("empty", 0),
    }


def _rows(folder: Path, split: str) -> Iterator[Mapping[str, Any]]:
    return (record for _, record in read_records(folder / f"{split}.jsonl"))


def _counted_as(row: Mapping[str, Any], name: str) -> str:
    """The data set that a row counts for: its own if it is one we know, else the one read."""
    return row["source"] if row["source"] in DATA_SETS else name


def _licences(splits: Mapping[str, Any]) -> dict[str, str]:
    names = dict.fromkeys(name for split in splits.values() for name in split["sources"])
    return {name: DATA_SETS[name].licence for name in names}


def _version() -> str | None:
    try:
        return importlib.metadata.version("agentr1")
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return None


def _key(question: str) -> int:
    return digest(normalize_answer(question) or question)


# The command -----------------------------------------------------------------------------------


def report(card: Mapping[str, Any], out: Path) -> None:
    """Say in some lines what the folder holds."""
    for split, record in card["splits"].items():
        for name, counts in record["sources"].items():
            reasons = [f"{c:,} {REASONS[r]}" for r, c in counts["left_out"].items() if c]
            told = f"; left out: {', '.join(reasons)}" if reasons else ""
            of = f"of {counts['read']:,} questions"
            print(f"{split:7}{name:10}{counts['questions']:>10,} {of}{told}")
    for note in notes(card["splits"]):
        print(f"note: {note}")
    corpus = card["corpus"]
    print(f"corpus {'':10}{corpus['passages']:>10,} passages" if corpus else "no passages")
    if corpus and corpus["long"]:
        told = f"{corpus['long']:,} passages have {LONG:,} characters or more, the longest"
        print(f"warning: {told} {corpus['longest']:,}; they are kept whole")
    where = f"--dataset {out}" + (f" --corpus {out / CORPUS}, or an index of it" if corpus else "")
    print(f"in {out}, see its {README}; agentr1 train RECIPE {where}")


def main(argv: Sequence[str] | None = None) -> int:
    """`agentr1 data NAME --out DIR [--split S ...] [--n N] [--seed S] [--source hub|PATH]`."""
    parser = argparse.ArgumentParser(
        prog="agentr1 data",
        description="Prepare a published question set: rows, passages and a card.",
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=NAMES, help=f"data set; {MIX} is the mix of its paper")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=(), help="those there are")
    parser.add_argument(
        "--n",
        type=int,
        help=f"questions drawn from each split; for {MIX}, from each train split ({MIX_ROWS})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (0)")
    parser.add_argument(
        "--source", default=HUB, metavar="hub|PATH", help="the Hub, or a folder or file (hub)"
    )
    parser.add_argument("--force", action="store_true", help="replace what DIR holds")
    add_debug(parser)
    args = parser.parse_args(argv)

    def work() -> None:
        card = prepare(
            args.name,
            args.out,
            splits=args.split,
            n=args.n,
            seed=args.seed,
            source=args.source,
            force=args.force,
            command=["data", *(argv or ())],
        )
        report(card, args.out)

    return guarded(work, args.debug)
