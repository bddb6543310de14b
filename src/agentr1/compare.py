"""`agentr1 compare`: two evaluations side by side, paired where they saw the same rows.

Reads only the `evaluation/` folders of runs; used by `train` for its closing table as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agentr1.commandline import add_debug, guarded
from agentr1.runs import read_scores
from agentr1.statistics import Interval, mean_ci, paired_difference, unpaired_difference


def compare(
    first: tuple[str, Path], second: tuple[str, Path], metric: str, title: str = ""
) -> Interval:
    """Print two evaluations and their difference, and return the difference.

    Args:
        first: label and path of an `evaluation/*.jsonl` file.
        second: the one it is compared with.
        metric: a metric that both hold.
        title: of the table.

    Returns:
        Second minus first, paired when both evaluated the same rows.

    Raises:
        FileNotFoundError, ValueError: from reading the files.
    """
    values = [read_scores(path, metric) for _, path in (first, second)]
    intervals = [mean_ci(list(v.values())) for v in values]
    difference, how = _difference(*values)
    table = Table(title=title or metric)
    for column in ("", metric, "95% interval", "rows"):
        table.add_column(column, justify="right" if column else "left")
    for (label, _), interval in zip((first, second), intervals, strict=True):
        table.add_row(label, *_cells(interval))
    table.add_row(f"difference ({how})", *_cells(difference, sign="+"))
    overlap = intervals[0].low <= intervals[1].high and intervals[1].low <= intervals[0].high
    table.caption = f"The two intervals {'overlap' if overlap else 'do not overlap'}."
    Console().print(table)
    return difference


def _difference(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[Interval, str]:
    if first.keys() == second.keys():
        return paired_difference(second, first), "paired"
    return unpaired_difference(list(second.values()), list(first.values())), "unpaired"


def _cells(interval: Interval, sign: str = "") -> tuple[str, str, str]:
    return (
        f"{interval.mean:{sign}.3f}",
        f"[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]",
        str(interval.n),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`agentr1 compare RUN RUN2 --metric exact_match`."""
    parser = argparse.ArgumentParser(
        prog="agentr1 compare", description="Compare the final evaluations of two runs."
    )
    parser.add_argument("run", type=Path, help="a run folder, or runs/<recipe>/latest")
    parser.add_argument("other", type=Path, help="the run to compare it with")
    parser.add_argument("--metric", default="exact_match", help="(%(default)s)")
    parser.add_argument("--evaluation", default="after", help="which evaluation of the runs")
    add_debug(parser)
    args = parser.parse_args(argv)
    sides = [
        (str(p), p / "evaluation" / f"{args.evaluation}.jsonl") for p in (args.run, args.other)
    ]
    return guarded(lambda: compare(sides[0], sides[1], args.metric), args.debug)
