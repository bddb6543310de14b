"""The limits under which tools are run: of one tool over all rollouts, and of one episode.

Layer 1. Plain values and counters; `tools/runner.py` keeps to them. Nothing here runs a tool.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, NamedTuple

_LONGEST_PAUSE = 30.0


@dataclasses.dataclass(frozen=True)
class ToolPolicy:
    """Limits under which a tool is run.

    Only a fault of the infrastructure is tried again: any exception that is not a `ToolError`,
    a timeout and a result without a text form included. A retry may meet a tool whose first
    attempt did its work and lost only the answer, so ask for retries (and for the cache) only
    where calling twice does no harm.
    """

    timeout: float = 30.0
    """Seconds one attempt may take once it has a slot; longer is a fault."""
    retries: int = 0
    """Further attempts after a fault."""
    backoff: float = 0.5
    """Seconds before the first retry at most, doubled for each further one up to 30. Half of it is
    drawn at random, so that calls which failed together do not come back together."""
    deadline: float | None = None
    """Seconds for all attempts and the pauses between them, counted from the first slot; None sets
    no limit beyond those of the attempts."""
    concurrency: int = 32
    """Calls of one tool that may run at once, over all rollouts that share the runner."""
    cache: bool = False
    """Answer a call that equals an earlier one, or one under way, by that one's result. Only
    successes are kept. They stay for the life of the runner: tools do not depend on weights."""
    max_calls: int | None = None
    """Calls of the tool in one episode; further ones are the model's mistake and are not run."""
    max_chars: int = 4000
    """Characters of a result that the policy is shown; the rest is cut, and a note says so."""

    def __post_init__(self) -> None:
        checks = {
            "timeout": (_is_positive(self.timeout), "a positive number"),
            "retries": (_is_count(self.retries, 0), "a whole number, 0 or more"),
            "backoff": (self.backoff == 0 or _is_positive(self.backoff), "0 or more"),
            "deadline": (self.deadline is None or _is_positive(self.deadline), "positive or None"),
            "concurrency": (_is_count(self.concurrency, 1), "a whole number, 1 or more"),
            "cache": (isinstance(self.cache, bool), "True or False"),
            "max_calls": (
                self.max_calls is None or _is_count(self.max_calls, 1),
                "a whole number, 1 or more, or None",
            ),
            "max_chars": (_is_count(self.max_chars, 1), "a whole number, 1 or more"),
        }
        for field in dataclasses.fields(self):
            holds, expected = checks[field.name]
            if not holds:
                raise ValueError(
                    f"ToolPolicy.{field.name} is {getattr(self, field.name)!r}, expected "
                    f"{expected}, like its default {field.default}"
                )

    def pause(self, attempt: int, draw: float) -> float:
        """Seconds between a failed attempt (1 is the first) and the next, for a draw in [0, 1)."""
        longest = min(self.backoff * 2.0 ** min(attempt - 1, 60), max(_LONGEST_PAUSE, self.backoff))
        return longest * (1.0 + draw) / 2.0


class Place(NamedTuple):
    """Where in a run a call stands; `turn`, and `position` in the turn, count from 0."""

    row_id: str
    turn: int
    position: int


@dataclasses.dataclass(slots=True)
class EpisodeCalls:
    """The calls of one episode so far.

    Attributes:
        row_id: of the episode's row.
        turn: the turn whose calls are run next, counted from 0.
        max_calls: calls of all tools together; None for no limit.
        finish_tool: counts for nothing in `max_calls`, so that the episode can still be finished.
        made: calls that were run, by tool.
    """

    row_id: str = "?"
    turn: int = 0
    max_calls: int | None = None
    finish_tool: str | None = None
    made: Counter[str] = dataclasses.field(default_factory=Counter)

    def refusal(self, name: str, max_calls: int | None) -> str | None:
        """Count a call that is to be run, or tell the model which budget forbids it."""
        if max_calls is not None and self.made[name] >= max_calls:
            return f"the budget of {max_calls} calls of {name!r} is used up, go on without it"
        together = self.made.total() - self.made[self.finish_tool or ""]
        if self.max_calls is not None and together >= self.max_calls and name != self.finish_tool:
            return f"the budget of {self.max_calls} tool calls is used up, finish without more"
        self.made[name] += 1
        return None


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
