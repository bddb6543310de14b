"""Record what tools answer, and replay it without them.

Layer 1. Two runners in the place of `ToolRunner`: one writes a line per call that was run, the
other answers calls from such lines, for debugging, for CI without a retriever and for scoring
again. Calls that no tool ever sees (unreadable, unknown, wrong arguments, over a budget) are on no
tape: both runners refuse them as always. Nothing here knows recipes or messages.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from agentr1.tools.base import Tool, schema
from agentr1.tools.policy import Place, ToolPolicy
from agentr1.tools.rendering import bounded
from agentr1.tools.runner import ToolRunner
from agentr1.types import ToolCall, ToolOutcome

SCHEMA_VERSION = 1
_LOGGER = logging.getLogger(__name__)
_KEPT = ("content", "reward", "failure", "seconds", "attempts", "cached", "waited")
"""Fields of a `ToolOutcome` that a line holds beside the call and its place."""


class RecordingRunner(ToolRunner):
    """Runs tools and appends every outcome to a file.

    The file begins with a line that holds the tools' schemas; each start adds another. A line is
    one write to a file opened for appending, so processes may share the file, and a kill loses
    nothing that was answered before it.

    Args:
        path: made where it does not exist, with its folder; otherwise added to.
        tools, policies, default_policy: as in `ToolRunner`.

    Raises:
        ValueError: the file is no recording, or one of other tools.
    """

    def __init__(
        self,
        path: str | Path,
        tools: Sequence[Tool],
        policies: Mapping[str, ToolPolicy] | None = None,
        default_policy: ToolPolicy | None = None,
    ) -> None:
        super().__init__(tools, policies, default_policy)
        self.path = Path(path).absolute()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        described = [schema(tool) for tool in tools]
        torn = False
        if self.path.exists() and self.path.stat().st_size:
            if _read_header(self.path) != described:
                raise ValueError(
                    f"{self.path} is a recording of other tools than {[t.name for t in tools]}, or "
                    "of older versions of them; record into another file"
                )
            with self.path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                torn = file.read() != b"\n"
        self.path.touch()
        if torn:  # a killed process left half a line
            self._append(b"\n")
        self._append(_line({"tools": described}))

    async def execute(self, call: ToolCall, place: Place) -> ToolOutcome:
        """Run the call and write down what became of it."""
        outcome = await super().execute(call, place)
        record = {
            **{"row": place.row_id, "turn": place.turn, "index": place.position},
            **{"name": call.name, "arguments": dict(call.arguments)},
            **{name: getattr(outcome, name) for name in _KEPT},
        }
        self._append(_line(record))
        return outcome

    def _append(self, line: bytes) -> None:
        # Not created here: a file that went away in the meantime would lack its first line.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(f"{self.path}: a line was cut, the disk is full")
        finally:
            os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class RecordedTool:
    """What a recording tells of a tool: all that the policy is shown."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    async def __call__(self, **arguments: Any) -> Any:
        """Never called by a `ReplayingRunner`."""
        raise RuntimeError(f"{self.name!r} is known from a recording, it cannot be run")


class ReplayingRunner(ToolRunner):
    """Answers calls from a recording, the same call always in the same way.

    Of equal calls the one of the same row, turn and place in the turn is taken, else of the same
    row and turn, else of the same row, else any; of several the last recorded. Faults come back as
    faults. A call that is not in the recording is a fault too.

    Args:
        path: written by a `RecordingRunner`.
        policies, default_policy: as in `ToolRunner`; only their `max_calls` matters here.
        latency: waits so many times the seconds that each call took; 0 answers at once.

    Raises:
        ValueError: the file is no recording.
    """

    def __init__(
        self,
        path: str | Path,
        policies: Mapping[str, ToolPolicy] | None = None,
        default_policy: ToolPolicy | None = None,
        latency: float = 0.0,
    ) -> None:
        if not latency >= 0.0:
            raise ValueError(f"latency is {latency}, expected a factor of 0 or more")
        self.path = Path(path)
        self.latency = latency
        tools = [RecordedTool(**described["function"]) for described in _read_header(self.path)]
        super().__init__(tools, policies, default_policy)
        self._recorded: dict[tuple[Any, ...], Mapping[str, Any]] = {}
        for record in _records(self.path):
            place = Place(record["row"], record["turn"], record["index"])
            for key in _keys(record["name"], record["arguments"], place):
                self._recorded[key] = record

    async def execute(self, call: ToolCall, place: Place) -> ToolOutcome:
        """Answer from the recording."""
        keys = _keys(call.name, call.arguments, place)
        record = next((self._recorded[key] for key in keys if key in self._recorded), None)
        if record is None:
            asked = json.dumps(dict(call.arguments), ensure_ascii=False)
            error = LookupError(
                f"{self.path.name} holds no call {call.name}({asked[:60]}); --tools "
                "record:FILE adds it"
            )
            content = bounded(self.fault_text(call, place, error), 400)
            return ToolOutcome(call.id, call.name, call.arguments, content, failure="fault")
        await asyncio.sleep(self.latency * record["seconds"])
        kept = {name: record[name] for name in _KEPT}
        return ToolOutcome(call.id, call.name, call.arguments, **kept)


def _keys(name: str, arguments: Mapping[str, Any], place: Place) -> list[tuple[Any, ...]]:
    """Under which a call is looked for, the closest first."""
    call = json.dumps([name, dict(arguments)], sort_keys=True)
    return [(call, *place[:width]) for width in (3, 2, 1, 0)]


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps({"schema": SCHEMA_VERSION, **record}, ensure_ascii=False)
    return text.encode("utf-8", errors="replace") + b"\n"


def _read_header(path: Path) -> list[dict[str, Any]]:
    """The tools' schemas from the first line."""
    with path.open("rb") as file:
        header = _parsed(file.readline())
    if header is None or "tools" not in header:
        raise ValueError(
            f"{path} is no recording of tools: line 1 lacks the tools' schemas; expected a file "
            "that --tools record:FILE has written"
        )
    if header.get("schema") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema {header.get('schema')!r}, expected {SCHEMA_VERSION}; record it anew"
        )
    return header["tools"]


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    """The calls of a recording; what a killed process left of a line is passed over, and said."""
    expected = {"row", "turn", "index", "name", "arguments", *_KEPT}
    described = _read_header(path)
    torn = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            record = _parsed(line)
            starts = record is not None and record.get("tools") == described
            if torn and not starts:  # a process tears only the last line it writes
                _refuse(path, torn)
            if record is None:
                _LOGGER.warning("%s: line %d is incomplete and passed over", path, number)
                torn = number
            elif starts:
                torn = 0
            elif expected <= record.keys():
                yield record
            else:
                _refuse(path, number)


def _refuse(path: Path, number: int) -> NoReturn:
    raise ValueError(
        f"{path}, line {number} is not what --tools record:FILE writes; take the line out, or "
        "record the file anew"
    )


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
