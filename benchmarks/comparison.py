"""What every benchmark reports: ours against another's, as a ratio with a target.

A machine is never quiet and never the reader's, so seconds are shown and ratios decide. Both sides
run in turn, so that what slows the machine for a while slows both.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One line of a benchmark.

    Attributes:
        name: what was measured.
        ours_s: median seconds of this package.
        theirs_s: median seconds of what it is compared with.
        workload: what the work was, in numbers and words.
        target: what the ratio is to reach; None where it is only shown.
        direction: "at least" or "at most" the target.
    """

    name: str
    ours_s: float
    theirs_s: float
    workload: Mapping[str, Any]
    target: float | None = None
    direction: Literal["at least", "at most"] = "at least"

    @property
    def ratio(self) -> float:
        """How many times as long the other side takes."""
        return self.theirs_s / self.ours_s

    @property
    def reached(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        short = (
            self.ratio < self.target if self.direction == "at least" else (self.ratio > self.target)
        )
        return not short

    def as_dict(self) -> dict[str, Any]:
        """The shape of a line in a result file."""
        return {
            "name": self.name,
            "ratio": round(self.ratio, 3),
            "target": self.target,
            "direction": self.direction,
            "reached": self.reached,
            "ours_s": round(self.ours_s, 4),
            "theirs_s": round(self.theirs_s, 4),
            "workload": dict(self.workload),
        }


def medians(
    ours: Callable[[], float], theirs: Callable[[], float], repeats: int
) -> tuple[float, float]:
    """Time both sides in turn; each function runs once and returns its seconds."""
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second)


def table(comparisons: Sequence[Comparison]) -> str:
    """The result as text."""
    lines = [f"{'':<24}{'ours':>10}{'theirs':>10}{'ratio':>8}   target"]
    for c in comparisons:
        target = "" if c.target is None else f"{c.direction} {c.target:g}"
        verdict = {None: "", True: ", reached", False: ", MISSED"}[c.reached]
        lines.append(
            f"{c.name:<24}{c.ours_s:>8.2f} s{c.theirs_s:>8.2f} s{c.ratio:>7.2f}x   "
            f"{target}{verdict}"
        )
    return "\n".join(lines)


def finish(comparisons: Sequence[Comparison], path: str | None) -> int:
    """Print the table, write the file where one is asked for, and return the exit code."""
    print(table(comparisons))
    if path:
        text = json.dumps([c.as_dict() for c in comparisons], indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")
    return int(any(c.reached is False for c in comparisons))
