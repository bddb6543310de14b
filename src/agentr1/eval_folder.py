"""What is on the disk while `agentr1 eval` is at work, so that it can be killed and go on.

Layer 6: knows paths, lines and settings, neither models nor metrics. A system's transcripts are
one line per question in the order of the ids, added a whole batch at a time: a batch is what a
number depends on (`lockstep`), so one that was cut off is played again from its first question.
Each system has settings of its own; transcripts of other settings are never added to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from agentr1.locks import locked
from agentr1.retrieval.manifest import NAME as MANIFEST
from agentr1.retrieval.manifest import read_manifest
from agentr1.runs import write_json
from agentr1.types import Row

SETTINGS = "settings.json"
_LOCK = ".lock"
_PART = 1 << 20  # a whole file of weights takes minutes to read


@dataclasses.dataclass(frozen=True)
class EvalFolder:
    """An evaluation under way or done.

    Attributes:
        path: `evaluation/` with transcripts and `settings.json` is in it.
    """

    path: Path

    def transcripts(self, system: str) -> Path:
        """The policy's are named as those that a training run ends with."""
        name = "after" if system == "policy" else system
        return self.path / "evaluation" / f"{name}.jsonl"

    def settings(self) -> dict[str, dict[str, Any]]:
        """What each system here was played with."""
        path = self.path / "evaluation" / SETTINGS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def accept(self, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        """Record the settings of systems; see `check` for what it raises. Call it `alone`."""
        write_json(self.path / "evaluation" / SETTINGS, self.check(wanted))

    def check(self, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """See that systems have the settings they were begun with, if they were; write nothing.

        Returns:
            The settings of all systems, those that were begun and these.

        Raises:
            ValueError: a setting differs; the message says which, and from what. Or the systems
                would not share their `untrained` model.
        """
        begun = self.settings()
        plain: dict[str, dict[str, Any]] = json.loads(json.dumps(wanted, default=str))
        for system, settings in plain.items():
            differing = list(_differences(begun.get(system, settings), settings))
            if differing:
                raise ValueError(
                    f"{self.path} holds an evaluation of {system} with other settings: "
                    f"{'; '.join(differing)}; give another --out or the settings it was begun "
                    "with, or remove it"
                )
        both = (begun | plain).items()
        bases = {name: s["untrained"] for name, s in both if s.get("untrained")}
        if len(set(bases.values())) > 1:
            raise ValueError(
                f"{self.path} would compare baselines of different untrained models: {bases}; "
                "give another --out, or the model it was begun with"
            )
        foreign = sorted(
            str(path.relative_to(self.path))
            for path in itertools.chain(self.path.glob("*"), self.path.glob("evaluation/*"))
            if path.name not in ("evaluation", _LOCK)
        )
        if not begun and foreign:
            raise ValueError(
                f"{self.path} holds no evaluation that could go on, but is not empty: "
                f"{foreign[:5]}; give another --out"
            )
        return begun | plain

    def alone(self) -> IO[str]:
        """Keep other processes out until what comes back is closed.

        Raises:
            RuntimeError: another process is at work here.
        """
        (self.path / "evaluation").mkdir(parents=True, exist_ok=True)
        return locked(self.path / "evaluation" / _LOCK, self.path)

    def done(self, system: str, ids: Sequence[str], at_once: int) -> int:
        """How many questions of a system are done; what an interrupt cut off is removed.

        Args:
            system: whose.
            ids: of all questions, in the order in which they are played.
            at_once: questions of a batch.

        Raises:
            ValueError: the transcripts are of other questions.
        """
        path = self.transcripts(system)
        if not path.is_file():
            return 0
        done = kept = size = 0
        with path.open("rb") as file:
            for i, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                size += len(line)
                found = _id_of(line)
                if i >= len(ids) or found != ids[i]:
                    raise ValueError(
                        f"{path}, line {i + 1}: expected question "
                        f"{ids[i] if i < len(ids) else 'none'!r}, got {found!r}; the file was "
                        "changed, remove it or give another --out"
                    )
                if (i + 1) % at_once == 0 or i + 1 == len(ids):
                    done, kept = i + 1, size
        with path.open("rb+") as file:
            file.truncate(kept)
        return done


def newest_evaluation(recipe_name: str, root: Path = Path("runs")) -> Path:
    """The newest folder of a recipe's evaluations.

    Raises:
        FileNotFoundError: there is none.
    """
    parent = root / "eval" / recipe_name
    found = sorted(p.parent.parent for p in parent.glob(f"*/evaluation/{SETTINGS}"))
    found = [path for path in found if not path.is_symlink()]
    if not found:
        raise FileNotFoundError(
            f"--resume found no evaluation under {parent}; start without --resume, or name its "
            "folder with --out"
        )
    return found[-1]


def fingerprint_of_corpus(place: Path | str) -> str:
    """`fingerprint`; of an index, only of what searches read.

    How good an index is may be measured, and noted in it, later.
    """
    folder = Path(place)
    if not (folder / MANIFEST).is_file():
        return fingerprint(place)
    return _digest(folder, [folder / name for name in (MANIFEST, *read_manifest(folder).files)])


def fingerprint(place: Path | str) -> str:
    """Tell the contents of a file or folder apart from others, without reading all of it.

    Sizes, and the first and last megabyte of each file; of an address or a Hub id, its text.
    """
    path = Path(place)
    if not path.exists():
        return str(place)
    return _digest(path, [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path])


def _digest(path: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(_PART))
            content.seek(max(0, file.stat().st_size - _PART))
            digest.update(content.read(_PART))
    return digest.hexdigest()[:16]


def digest_of_rows(rows: Iterable[Row]) -> str:
    """Tell questions apart by all they hold, whatever their order."""
    lines = sorted(json.dumps(row, sort_keys=True, default=str) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _id_of(line: bytes) -> object:
    try:
        return json.loads(line)["id"]
    except (ValueError, KeyError, TypeError):
        return None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key in dict.fromkeys([*old, *new]):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            yield f"{prefix}{key} was {before!r} and is {now!r}"
