"""Scores by kind of question: per number of hops, per type, per data set.

Layer 6: evaluated rows in, nested dictionaries out; knows neither files nor systems' insides. A row
that lacks a column is left out of that column's table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from agentr1.scoring import Outcome
from agentr1.statistics import mean_ci
from agentr1.types import Row

COLUMNS = ("hops", "type", "source")
"""The columns of a row that a table may be made by."""


def breakdown(
    systems: Mapping[str, Sequence[Outcome]], covered: Mapping[str, bool] | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Means and intervals per value of each column that rows have.

    Args:
        systems: name to outcomes, all on the same rows.
        covered: by row id, whether the corpus holds the answer; None where that is not known.

    Returns:
        `{column: {value: {"n", "ceiling", "systems": {name: {metric: {"mean", "ci95"}}}}}}`; a
        column that no row has is not there.
    """
    rows = {o.row_id: o.row for outcomes in systems.values() for o in outcomes}
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for column in COLUMNS:
        kinds = _kinds(rows, column)
        for value in sorted(kinds, key=lambda v: (len(v), v) if v.isdecimal() else (99, v)):
            ids = kinds[value]
            known = [covered[i] for i in ids if covered is not None and i in covered]
            tables.setdefault(column, {})[value] = {
                "n": len(ids),
                "ceiling": sum(known) / len(known) if known else None,
                "systems": {
                    name: _scores([o for o in outcomes if o.row_id in ids])
                    for name, outcomes in systems.items()
                },
            }
    return tables


def _kinds(rows: Mapping[str, Row], column: str) -> dict[str, set[str]]:
    """Ids of the rows by what they have in a column."""
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for row_id, row in rows.items():
        value = row.get(column)
        if isinstance(value, str | int) and str(value):
            kinds[str(value)].add(row_id)
    return kinds


def _scores(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    names = outcomes[0].values if outcomes else ()
    intervals = {name: mean_ci([o.values[name] for o in outcomes]) for name in names}
    return {name: {"mean": i.mean, "ci95": [i.low, i.high]} for name, i in intervals.items()}
