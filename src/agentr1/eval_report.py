"""What an evaluation says in the end: `eval.json`, tables in the terminal, a plot.

Layer 7: made from transcripts alone, so that an evaluation that was interrupted ten times reports
like one that was not. Plays nothing and loads no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agentr1.breakdown import breakdown
from agentr1.ceiling import Ceiling
from agentr1.scoring import Outcome, summary_of
from agentr1.statistics import mcnemar, paired_difference

SCHEMA_VERSION = 1
"""Of `eval.json`; docs/evaluation.md says what is in it."""

_EPISODE = {
    "turns": "turns",
    "calls": "calls",
    "prompt_tokens": "prompt",
    "generated_tokens": "generated",
    "observation_tokens": "observed",
    "seconds": "seconds",
    "wall_seconds": "wall clock",
}
"""Numbers of a summary to their column: per episode, but for the last, which is of all of them."""


def report_of(
    systems: Mapping[str, Sequence[Outcome]], ceiling: Ceiling, about: Mapping[str, Any]
) -> dict[str, Any]:
    """All that `eval.json` holds.

    Args:
        systems: name to outcomes, the policy first, all on the same rows.
        ceiling: of the corpus.
        about: recipe, models, budget and the like, kept as they are.
    """
    summaries = {name: summary_of(outcomes) for name, outcomes in systems.items()}
    return {
        "schema": SCHEMA_VERSION,
        **about,
        "corpus": {"answer_coverage": ceiling.share, "note": ceiling.note},
        "after": summaries["policy"],
        "systems": summaries,
        "comparisons": list(_comparisons(systems)),
        "breakdown": breakdown(systems, ceiling.covered),
    }


def _comparisons(systems: Mapping[str, Sequence[Outcome]]) -> Iterator[dict[str, Any]]:
    """The policy against each baseline, on the same rows."""
    for name, outcomes in systems.items():
        if name == "policy":
            continue
        for metric in outcomes[0].values:
            ours, theirs = (
                {o.row_id: o.values[metric] for o in side} for side in (systems["policy"], outcomes)
            )
            difference, test = paired_difference(ours, theirs), mcnemar(ours, theirs)
            yield {
                "system": "policy",
                "versus": name,
                "metric": metric,
                "difference": difference.mean,
                "ci95": [difference.low, difference.high],
                "n": difference.n,
                "mcnemar": None if test is None else test._asdict(),
            }


def show(report: Mapping[str, Any], title: str) -> None:
    """Print the tables."""
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console = Console(width=140)
    for table in _tables(report, title):
        console.print(table)
    for name, system in report["systems"].items():
        if system.get("faults"):
            console.print(
                f"{name}: faults of tools {system['faults']:.2f} per episode: the policy was shown "
                "errors that were not its own, so this is no fair score",
                markup=False,
            )


def _tables(report: Mapping[str, Any], title: str) -> Iterator[Table]:
    yield _score_table(report, title)
    if report["comparisons"]:
        yield _comparison_table(report)
    yield _episode_table(report)
    for column, values in report["breakdown"].items():
        if len(values) > 1:
            yield _breakdown_table(report, column, values)


def _metrics(report: Mapping[str, Any]) -> list[str]:
    return list(report["after"]["intervals"])


def _score_table(report: Mapping[str, Any], title: str) -> Table:
    metrics = _metrics(report)
    table = _table(title, ["system", *metrics])
    for name, system in report["systems"].items():
        cells = [_score(system[m], system["intervals"][m]) for m in metrics]
        table.add_row(name, *cells)
    coverage = report["corpus"]["answer_coverage"]
    known = "not known" if coverage is None else f"{coverage:.3f}"
    table.add_section()
    table.add_row("corpus ceiling", *[known] * len(metrics))
    table.caption = f"95% intervals of a bootstrap over questions. Ceiling: {_note(report)}."
    return table


def _note(report: Mapping[str, Any]) -> str:
    return str(report["corpus"]["note"])


def _comparison_table(report: Mapping[str, Any]) -> Table:
    columns = ["versus", "metric", "policy better by", "p", "policy alone", "baseline alone"]
    table = _table("policy minus baseline, paired by question", columns)
    last = None
    for found in report["comparisons"]:
        if found["versus"] != last:
            table.add_section()
        test = found["mcnemar"]
        rights = ["", "", ""]
        if test is not None:
            rights = [f"{test['p']:.2g}", str(test["only_a"]), str(test["only_b"])]
        low, high = found["ci95"]
        difference = f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        name = found["versus"] if found["versus"] != last else ""
        table.add_row(name, found["metric"], difference, *rights)
        last = found["versus"]
    table.caption = (
        "95% intervals of a bootstrap over questions. Where a metric is 0 or 1: p of McNemar's "
        "exact test, and how many questions one side alone got right."
    )
    return table


def _episode_table(report: Mapping[str, Any]) -> Table:
    table = _table("episodes", ["system", *_EPISODE.values(), "faults", "stop reasons"])
    for name, system in report["systems"].items():
        numbers = [f"{system.get(key, 0.0):.2f}" for key in ("turns", "calls")]
        tokens = ("prompt_tokens", "generated_tokens", "observation_tokens")
        numbers += [f"{system[key]:.0f}" for key in tokens]
        times = [f"{system['seconds']:.2f} s", f"{system['wall_seconds']:.0f} s"]
        reasons = ", ".join(f"{reason} {n}" for reason, n in system["stop_reasons"].items())
        table.add_row(name, *numbers, *times, f"{system['fault_share']:.1%}", reasons)
    table.caption = (
        "Means per episode: turns, calls, tokens of the prompt, of the policy and of observations; "
        "wall clock of all episodes. Faults: share of turns."
    )
    return table


def _breakdown_table(
    report: Mapping[str, Any], column: str, values: Mapping[str, Mapping[str, Any]]
) -> Table:
    metric = _metrics(report)[0]
    heads = [f"{value} (n={kind['n']})" for value, kind in values.items()]
    table = _table(f"{metric} by {column}", ["system", *heads])
    for name in report["systems"]:
        scores = [kind["systems"][name][metric] for kind in values.values()]
        table.add_row(name, *[_score(score["mean"], score["ci95"]) for score in scores])
    ceilings = [kind["ceiling"] for kind in values.values()]
    table.add_section()
    table.add_row("corpus ceiling", *["not known" if c is None else f"{c:.3f}" for c in ceilings])
    return table


def _score(mean: float, interval: Sequence[float]) -> str:
    return f"{mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def plot(report: Mapping[str, Any], path: Path) -> bool:
    """Draw each system's scores with their intervals, as `.png` and `.svg`.

    Returns:
        False where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    metrics, names = _metrics(report)[:4], list(report["systems"])
    coverage = report["corpus"]["answer_coverage"]
    figure = Figure(figsize=(2 + 2.6 * len(metrics), 1.2 + 0.4 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        systems = [report["systems"][name] for name in names]
        means = [system[metric] for system in systems]
        ends = [system["intervals"][metric] for system in systems]
        errors = [
            [mean - low for mean, (low, _) in zip(means, ends, strict=True)],
            [high - mean for mean, (_, high) in zip(means, ends, strict=True)],
        ]
        axes.errorbar(means, range(len(names)), xerr=errors, fmt="o", capsize=3)
        if coverage is not None:
            axes.axvline(coverage, linestyle="--", color="grey", label="corpus ceiling")
        axes.set_xlabel(metric.replace("_", " "))
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    if coverage is not None:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center")
    for suffix in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{suffix}"), dpi=150)
    return True
