"""What a command asks to be read: which splits of which data sets, from where, how many rows.

Layer 1. Looks at names and checksums of files and at their first records; reads no data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agentr1.sources import own
from agentr1.sources.finding import find_corpus, find_splits
from agentr1.sources.folder import README, check_files
from agentr1.sources.lines import stamp_of
from agentr1.sources.records import read_records
from agentr1.sources.table import DATA_SETS, MIX, MIX_DEV, MIX_ROWS, MIX_TRAIN

HUB = "hub"
ORDER = ("test", "dev", "train")
"""Train comes last, so that its overlap with the others is known when its questions are read."""


class Part(NamedTuple):
    """One split of one data set, to be read.

    Attributes:
        name: of the data set.
        split: of the folder.
        n: questions to draw from it; None for all.
        files: where it is read from; none for the Hub.
        corpus: passages that rows of ours name by id.
        aliases: further answers of official records.
    """

    name: str
    split: str
    n: int | None
    files: tuple[Path, ...] = ()
    corpus: Path | None = None
    aliases: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Everything that is read."""
        return (*self.files, *filter(None, (self.corpus, self.aliases)))


class _Wanted(NamedTuple):
    """A data set of the command, restricted to one split in a mix."""

    name: str
    split: str | None
    n: int | None


def plan(name: str, splits: Sequence[str], n: int | None, source: str) -> list[Part]:
    """Name everything that is read, in the order of `ORDER`.

    Args:
        name: data set or mix.
        splits: of the folder; those that are there if empty.
        n: rows to draw from each split, of a mix from each train split.
        source: `hub`, or a folder or file.

    Raises:
        ValueError, FileNotFoundError: there is no such split, or no such file.
    """
    wanted = [_Wanted(name, None, n)]
    if name == MIX:
        wanted = [_Wanted(member, "dev", None) for member in MIX_DEV]
        wanted += [_Wanted(member, "train", n or MIX_ROWS) for member in MIX_TRAIN]
        if n is not None and splits and "train" not in splits:
            raise ValueError(f"--n {n} counts train rows of {MIX}, and --split leaves train out")
    there = [
        (member, split, count, files)
        for member, only, count in wanted
        for split, files in _splits(member, only, source).items()
    ]
    absent = [s for s in splits if s not in {split for _, split, _, _ in there}]
    if absent:
        raise ValueError(
            f"{name} has no split {' or '.join(absent)} in {source}, it has "
            f"{', '.join(dict.fromkeys(split for _, split, _, _ in there))}; splits whose answers "
            "are withheld are not read"
        )
    parts = [
        Part(member, split, count, tuple(files), *_beside(member, files))
        for member, split, count, files in there
        if not splits or split in splits
    ]
    files = [file for part in parts for file in part.files]
    if len(set(files)) < len(files):
        raise ValueError(
            f"--source {source} has one file for several data sets; put each into a folder of its "
            f"name: {', '.join(dict.fromkeys(part.name for part in parts))}"
        )
    return sorted(parts, key=lambda part: ORDER.index(part.split))


def _splits(name: str, only: str | None, source: str) -> Mapping[str, Sequence[Path]]:
    dataset = DATA_SETS[name]
    found: Mapping[str, Sequence[Path]] = (
        dict.fromkeys(dataset.hub_splits, ())
        if source == HUB
        else find_splits(name, dataset, Path(source))
    )
    if only is not None and only not in found:
        raise FileNotFoundError(
            f"--source {source} has no {only} split of {name}, it has {', '.join(found)}; "
            f"{MIX} needs train of {' and '.join(MIX_TRAIN)} and dev of {', '.join(MIX_DEV)}"
        )
    return {split: files for split, files in found.items() if only in (None, split)}


def _beside(name: str, files: Sequence[Path]) -> tuple[Path | None, Path | None]:
    """The corpus of rows of ours, the aliases of official records."""
    if not files or files[0].suffix == ".parquet":
        return None, None
    _, record = next(read_records(files[0]), ("", {}))
    if own.is_own(record):
        return find_corpus(files), None
    aliases = DATA_SETS[name].aliases
    path = files[0].parent / aliases if aliases else None
    return None, path if path and path.is_file() else None


# Against what the folder holds -----------------------------------------------------------------


def requests(parts: Sequence[Part], seed: int) -> dict[str, dict[str, Any]]:
    """By split, what decides its content, as the card keeps it."""
    found = {}
    for split in dict.fromkeys(part.split for part in parts):
        of_split = [part for part in parts if part.split == split]
        found[split] = {
            "n": {part.name: part.n for part in of_split},
            "seed": seed if any(part.n for part in of_split) else None,
            "origins": {part.name: _origin(part) for part in of_split},
        }
    return found


def still_missing(
    out: Path, card: Mapping[str, Any], name: str, asked: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Splits asked for that a folder does not have yet.

    Raises:
        FileExistsError: it holds something else.
        ValueError: its files are not those of its card.
    """
    if card["name"] != name:
        raise FileExistsError(
            f"--out {out} holds {card['name']}; give another --out, or --force to replace it"
        )
    for split in asked.keys() & card["splits"].keys():
        if {key: card["splits"][split][key] for key in asked[split]} != asked[split]:
            raise FileExistsError(
                f"--out {out} holds another {split} of {name} (other --n, --seed or --source, see "
                f"its {README}); give another --out, or --force to replace all it holds"
            )
    check_files(out, card)
    return [split for split in asked if split not in card["splits"]]


def refuse_own_input(out: Path, parts: Sequence[Part]) -> None:
    """See that no file is both read and replaced.

    Raises:
        ValueError: one is.
    """
    for part in parts:
        for path in part.paths:
            if path.resolve().parent == out.resolve():
                raise ValueError(
                    f"--out {out} is where {path.name} is read from; give another --out"
                )


def _origin(part: Part) -> dict[str, Any]:
    if not part.files:
        dataset = DATA_SETS[part.name]
        return {"hub": dataset.repository, "config": dataset.config, "revision": dataset.revision}
    return {"files": [stamp_of(path) for path in part.paths]}
