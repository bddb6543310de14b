"""The README of a prepared data set, made from its card: what is in it, whose it is, how it came.

Layer 1. Adds nothing to the card; writes no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentr1.sources.table import DATA_SETS, SPLITS

REASONS = {
    "no_answer": "without an answer",
    "unanswerable": "made unanswerable on purpose",
    "overlap": "also asked in dev or test",
    "not_sampled": "not in the sample",
}
"""Why a question that was read is not written, in the card's words and in the README's."""


def readme(card: Mapping[str, Any]) -> str:
    """Lay a card out in Markdown."""
    splits = {split: card["splits"][split] for split in SPLITS if split in card["splits"]}
    names = dict.fromkeys(name for s in splits.values() for name in s["sources"])
    kinds = {split: _kinds(record) for split, record in splits.items()}
    parts = [
        f"# {card['name']}",
        f"Made by agentr1 {card['agentr1'] or 'from source'}; `card.json` has the same in numbers.",
        "## Questions\n\n" + _questions(splits),
        *(f"### Kinds of {split}\n\n{text}" for split, text in kinds.items() if text),
        "## Passages\n\n" + _passages(card["corpus"]),
        "## Sources\n\n" + "\n".join(_source(name, splits) for name in names),
        "## Files\n\n" + _files([*splits.values(), *filter(None, [card["corpus"]])]),
        "## Commands\n\n" + "\n".join(f"    {command}" for command in card["commands"]),
    ]
    return "\n\n".join(parts) + "\n"


def notes(splits: Mapping[str, Any]) -> list[str]:
    """What the numbers of a train split do not say."""
    train = splits.get("train")
    if train is None:
        return []
    found = []
    if train.get("overlap_checked") is False:
        found.append(
            "train questions that dev or test ask too were not looked for: the folder has neither; "
            "add one with --split if the source has it"
        )
    drawn = sum(n or 0 for n in train["n"].values())
    if taken := max(drawn - train["questions"], 0):
        found.append(
            f"{taken:,} of the {drawn:,} train questions drawn were taken out again, since a split "
            "added later asks them too; all splits in one command keep --n exact"
        )
    return found


def _questions(splits: Mapping[str, Any]) -> str:
    lines = ["| split | from | questions | of | left out |", "|---|---|---|---|---|"]
    for split, record in splits.items():
        for name, counts in record["sources"].items():
            reasons = ", ".join(
                f"{count:,} {REASONS[reason]}" for reason, count in counts["left_out"].items()
            )
            cells = [split, name, f"{counts['questions']:,}", f"{counts['read']:,}", reasons or "-"]
            lines.append(f"| {' | '.join(cells)} |")
    for note in notes(splits):
        lines += ["", f"{note[0].upper()}{note[1:]}."]
    return "\n".join(lines)


def _kinds(record: Mapping[str, Any]) -> str:
    lines = [
        f"- {name}, {kind}: " + ", ".join(f"{value} {count:,}" for value, count in values.items())
        for name, counts in record["sources"].items()
        for kind, values in counts.items()
        if kind in ("type", "hops", "level")
    ]
    return "\n".join(lines)


def _passages(corpus: Mapping[str, Any] | None) -> str:
    if corpus is None:
        return "None: these questions come without passages."
    return (
        f"{corpus['passages']:,} of every question that was read, sampled or not, each once; "
        f"{corpus['repeated']:,} repetitions and {corpus['empty']:,} empty ones were left out. The "
        f"longest has {corpus['longest']:,} characters, {corpus['long']:,} are long."
    )


def _source(name: str, splits: Mapping[str, Any]) -> str:
    lines = [f"- **{DATA_SETS[name].title}**, {DATA_SETS[name].licence}: {DATA_SETS[name].home}"]
    for split, record in splits.items():
        origin = record["origins"].get(name)
        if origin and "hub" in origin:
            where = f"{origin['hub']}, {origin['config']}, revision {origin['revision']}"
            lines.append(f"  - {split}: the Hub's {where}")
        elif origin:
            names = (f"{f['file']} (sha256 {f['sha256'][:16]})" for f in origin["files"])
            lines.append(f"  - {split}: {', '.join(names)}")
    return "\n".join(lines)


def _files(stamps: list[Mapping[str, Any]]) -> str:
    lines = ["| file | bytes | sha256 |", "|---|---|---|"]
    lines += [f"| {s['file']} | {s['bytes']:,} | `{s['sha256']}` |" for s in stamps]
    return "\n".join(lines)
