"""Questions in: files of rows to checked dictionaries, and those to what TRL's sampler takes.

Layer 6. `task.py` reads rows through it, `train.py` hands them to TRL. A row keeps every column
it came with, because rewards may read any of them; this module knows which columns must be there
and must not know environments, rewards or tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value

from agentr1.retrieval.manifest import NAME as MANIFEST
from agentr1.retrieval.manifest import check_corpus, read_manifest
from agentr1.retrieval.remote import is_address
from agentr1.sources.folder import CARD
from agentr1.sources.records import read_records

_ENDINGS = (".jsonl", ".jsonl.gz")
_TEXTS = List(Value("string"))
_COLUMNS: dict[str, Any] = {
    "id": Value("string"),
    "question": Value("string"),
    "answers": _TEXTS,
    "prompt": List({"role": Value("string"), "content": Value("string")}),
    "supporting_titles": _TEXTS,
}
_SCALARS: dict[type, str] = {str: "string", bool: "bool", int: "int64", float: "float64"}


def load_rows(
    path: str | Path, limit: int | None = None, *, questions: bool = True
) -> list[dict[str, Any]]:
    """Read questions, one JSON object a line.

    A line needs `id` (text, unique in the file), `question` (text) and `answers` (a list) or
    `answer` (one). The rows have `answers` as a list of text and, as TRL requires, `prompt`: the
    question as the user's message. Every other column is kept as it is.

    Args:
        path: a `.jsonl` or `.jsonl.gz` file.
        limit: read only so many rows, the first ones.
        questions: False for an environment that opens its episodes itself: rows need only `id`.

    Raises:
        ValueError: with file, line number, value and expectation.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"the limit for {path.name} must be at least 1, or unset, got {limit}")
    rows: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for place, record in itertools.islice(read_objects(path), limit):
        row = _row(record, place, questions)
        first = seen.setdefault(row["id"], place)
        if first != place:
            raise ValueError(
                f"{place}: id {row['id']!r} is also on {first.removeprefix(f'{path}, ')}; ids tell "
                "rows apart in every comparison, make them unique"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows, expected one JSON object a line")
    return rows


def read_objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read one JSON object a line as they are asked for, each with its place, file and line.

    Args:
        path: a `.jsonl` or `.jsonl.gz` file of UTF-8 text; empty lines are passed over.

    Raises:
        ValueError: with file and line number, also of text that could not be encoded again.
    """
    if not path.name.endswith(_ENDINGS):
        raise ValueError(f"expected one of {' or '.join(_ENDINGS)} files, got {path.name!r}")
    for place, record in read_records(path):
        _check_encodable(record, place)
        yield place, record


def find_split(dataset_dir: str | Path, split: str, *, dev_for_test: bool = False) -> Path:
    """Find a split's file in a dataset folder.

    Args:
        dataset_dir: holds `train`, `dev` and `test`, each `.jsonl` or `.jsonl.gz`.
        split: name of the file without its ending.
        dev_for_test: take `dev` where there is no `test`. Say so wherever a number is published.

    Raises:
        FileNotFoundError: listing the files there are.
        ValueError: the split exists twice.
    """
    folder = Path(dataset_dir)
    found = _one_of(folder, split)
    if found is None and split == "test" and dev_for_test:
        found = _one_of(folder, "dev")
    if found is None:
        raise FileNotFoundError(
            f"dataset {folder} has no split {split!r}, expected {split}.jsonl or {split}.jsonl.gz; "
            f"it has {_listing(folder)}"
        )
    return found


def find_corpus(dataset_dir: str | Path, corpus: str | Path | None = None) -> Path | str:
    """Find the passages: what is named, or `corpus.*` in the dataset's folder or its parent.

    Args:
        dataset_dir: the dataset's folder.
        corpus: a file, an index folder, a folder that holds `corpus.*`, or a server's address,
            which comes back as it is.

    Raises:
        FileNotFoundError: naming the places looked at.
        ValueError: both endings exist in one place, or an index in the dataset's folder is of
            passages that lay there before.
    """
    if corpus is not None and is_address(corpus):
        return str(corpus)
    if corpus is not None and (Path(corpus) / MANIFEST).is_file():
        _refuse_outdated(Path(corpus), Path(dataset_dir))
        return Path(corpus)
    if corpus is not None and Path(corpus).is_file():
        return Path(corpus)
    folder = Path(dataset_dir).absolute()
    places = [folder, folder.parent] if corpus is None else [Path(corpus).absolute()]
    for place in places:
        found = _one_of(place, "corpus")
        if found is not None:
            return found
    raise FileNotFoundError(
        f"no corpus: expected corpus.jsonl or corpus.jsonl.gz in {' or '.join(map(str, places))}; "
        "put it there, or name a file, an index folder or a server's address with `corpus`"
    )


def _refuse_outdated(index: Path, dataset: Path) -> None:
    """Refuse an index that was built before the passages beside it were replaced.

    Only one in the data set's own folder: any questions may be asked of an index elsewhere.
    """
    card = dataset / CARD
    if card.is_file() and index.resolve().is_relative_to(dataset.resolve()):
        corpus = json.loads(card.read_text(encoding="utf-8")).get("corpus")
        if corpus:
            check_corpus(index, read_manifest(index), {"name": corpus["file"], **corpus})


def to_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Pack rows for TRL; every column survives, values come back as they were.

    Arrow wants one type a column. The known columns and plain ones have it; any other is kept as
    JSON, so that mixed or nested values neither fail nor grow keys of their neighbours. A column
    that a row lacks is None there.

    Args:
        rows: as `load_rows` returns them.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    features = {name: _feature(name, values) for name, values in columns.items()}
    for name, feature in features.items():
        if isinstance(feature, Json):  # encoded here: a text such as "18" would come back as 18
            columns[name] = [None if v is None else json.dumps(v) for v in columns[name]]
    return Dataset.from_dict(columns, features=Features(features))


def _check_encodable(record: Mapping[str, Any], place: str) -> None:
    """Refuse here what a tokenizer, Arrow or a result's file would refuse without saying where."""
    for name, value in record.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{place}: {name!r} cannot be written as UTF-8 ({error}); remove half of a "
                "surrogate pair or put the whole character, and nest less deeply"
            ) from error


def _row(record: Mapping[str, Any], place: str, questions: bool) -> dict[str, Any]:
    for name in ("id", "question") if questions else ("id",):
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{place}: {name!r} must be a text that is not empty, got {_short(value)} among "
                f"the columns {sorted(record)}"
            )
    if not questions:  # TRL wants a prompt in any case; the environment's own is what is played
        return {**record, "prompt": [{"role": "user", "content": record["id"]}]}
    prompt = [{"role": "user", "content": record["question"]}]
    return {**record, "answers": _answers(record, place), "prompt": prompt}


def _answers(record: Mapping[str, Any], place: str) -> list[str]:
    answers = record.get("answers")
    if answers is None and record.get("answer") is not None:
        answers = [record["answer"]]
    # No true or false: as text they would equal neither "yes" nor "no".
    plain = isinstance(answers, list) and all(type(a) in (str, int, float) for a in answers)
    if not plain or not answers:
        raise ValueError(
            f"{place}: expected 'answers', a list of at least one text or number, or 'answer', "
            f"one of these, got {_short(answers)} among the columns {sorted(record)}"
        )
    return [str(answer) for answer in answers]


def _feature(name: str, values: Sequence[Any]) -> Any:
    present = [value for value in values if value is not None]
    if name in _COLUMNS and _fits(name, present):
        return _COLUMNS[name]
    kinds = {type(value) for value in present}
    kind = _SCALARS.get(kinds.pop()) if len(kinds) == 1 else None
    return Value(kind) if kind else Json()


def _fits(name: str, values: Sequence[Any]) -> bool:
    if _COLUMNS[name] is _TEXTS:
        return all(isinstance(v, list) and all(isinstance(x, str) for x in v) for v in values)
    return name == "prompt" or all(isinstance(value, str) for value in values)


def _one_of(folder: Path, stem: str) -> Path | None:
    found = [path for path in (folder / f"{stem}{end}" for end in _ENDINGS) if path.is_file()]
    if len(found) > 1:
        raise ValueError(
            f"{folder} has both {found[0].name} and {found[1].name}; remove one, so that it is "
            "clear which is read"
        )
    return found[0] if found else None


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no files: there is no such folder"
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(_ENDINGS))
    return ", ".join(names) or "no .jsonl or .jsonl.gz files"


def _short(value: Any) -> str:
    text = repr(value.strip() if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
