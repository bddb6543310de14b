"""What the trainings and evaluations gave: docs/results.json, docs/results.md and the curves."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from agentr1.cells import markdown, number
from agentr1.runs import stream_scores, write_json, write_text
from agentr1.statistics import (
    Interval,
    mean_over_runs,
    paired_difference_over_runs,
)
from benchmarks.results.mix import TESTED
from benchmarks.results.stages import BASELINES, RL, Stage

Scores = dict[str, dict[str, float]]
"""Metric to row id to value."""
METRICS = ("exact_match", "f1")
AGAINST = ("naive_rag", "base_tool_call", "cold_start")


def write_report(out: Path, stages: Sequence[Stage], scale: str, docs: Path) -> None:
    """Write docs/results.* from whatever is there."""
    systems = dict(_systems(out))
    if not systems:
        print("nothing has been evaluated yet")
        return
    commands = {stage.name: stage.shown for stage in stages}
    records = list(_records(out, systems, commands))
    differences = list(_differences(systems))
    write_json(docs / "results.json", {"scores": records, "comparisons": differences})
    write_text(docs / "results.md", _page(out, systems, differences, commands, scale))
    curves(out, docs / "results.svg")
    print(f"docs/results.json and results.md: {len(systems)} systems, {len(records)} scores")


def _systems(out: Path) -> Iterator[tuple[str, dict[int | None, dict[str, Scores]]]]:
    """System to seed (None for one that was not trained here) to data set to scores."""
    for name in BASELINES:
        path = out / "baselines" / "evaluation" / f"{name}.jsonl"
        if (out / "baselines" / "eval.json").exists() and path.exists():
            yield name, {None: _scores(path)}
    for name in RL:
        runs = sorted((out / "algorithms" / name).glob("seed*/eval.json"))
        found: dict[int | None, dict[str, Scores]] = {}
        for path in runs:
            seed = int(path.parent.name.removeprefix("seed"))
            found[seed] = _scores(path.parent / "evaluation" / "after.jsonl")
        if found:
            yield name, found


def _scores(path: Path) -> dict[str, Scores]:
    found: dict[str, Scores] = {name: defaultdict(dict) for name in TESTED}
    for scored in stream_scores(path):
        for metric in METRICS:
            found[str(scored.trajectory.row["source"])][metric][scored.row_id] = scored.values[
                metric
            ]
    return found


def _records(
    out: Path, systems: Mapping[str, Any], commands: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """One score of one system on one data set; seed null is the mean over seeds."""
    for name, seeds in systems.items():
        trained = None not in seeds
        chosen: list[tuple[int | None, list[Any]]] = [(s, [runs]) for s, runs in seeds.items()]
        if trained and len(seeds) > 1:
            chosen.append((None, list(seeds.values())))
        for seed, runs in chosen:
            for dataset in TESTED:
                for metric in METRICS:
                    interval = _mean(runs, dataset, metric)
                    yield {
                        "system": name,
                        "dataset": dataset,
                        "metric": metric,
                        "value": interval.mean,
                        "ci95": [interval.low, interval.high],
                        "n": interval.n,
                        "seed": seed,
                        "steps": _steps(out, name) if trained else 0,
                        "device": _device(),
                        "command": commands["algorithms" if trained else "baselines"],
                    }


def _differences(systems: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every trained system against those that were not, and the cold start against the others."""
    for name in (*RL, "cold_start"):
        for other in AGAINST:
            if name == other or name not in systems or other not in systems:
                continue
            runs, base = list(systems[name].values()), systems[other][None]
            for dataset in TESTED:
                for metric in METRICS:
                    interval = paired_difference_over_runs(
                        [run[dataset][metric] for run in runs],
                        [base[dataset][metric]] * len(runs),
                    )
                    yield {
                        "system": name,
                        "versus": other,
                        "dataset": dataset,
                        "metric": metric,
                        "difference": interval.mean,
                        "ci95": [interval.low, interval.high],
                        "n": interval.n,
                    }


def _mean(runs: Sequence[Mapping[str, Scores]], dataset: str, metric: str) -> Interval:
    return mean_over_runs([run[dataset][metric] for run in runs])


def _steps(out: Path, name: str) -> int:
    states = sorted((out / "algorithms" / name).glob("seed*/checkpoint-*/trainer_state.json"))
    steps = [json.loads(s.read_text(encoding="utf-8"))["global_step"] for s in states]
    return max(steps, default=0)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


# The page ----------------------------------------------------------------------------------------

_INTRODUCTION = """# Results on real questions

SmolLM2-135M-Instruct learns to search and to answer: a cold start on demonstrations built from the
supporting facts of *train* questions, then reinforcement learning with `recipes/multihop`. One
command makes everything; it may be stopped and given again:

```bash
{command}
```

Device: {device}. Trained on HotpotQA and 2Wiki, tested greedily on dev questions of these (in
domain) and of MuSiQue (out of domain). {rows}
A corpus of {passages} passages, BM25, the same for all. These are not the settings of any paper: a
small model, a small corpus that holds the questions' own passages, few train questions. Compare
rows of the tables below with each other and with nothing else; results.json has every figure.
"""


def _page(
    out: Path,
    systems: Mapping[str, Any],
    differences: Sequence[Mapping[str, Any]],
    commands: Mapping[str, str],
    scale: str,
) -> str:
    mix = json.loads((out / "data" / "mix.json").read_text(encoding="utf-8"))
    again = "make results" + (f" ARGS='--scale {scale}'" if scale != "gpu" else "")
    parts = [
        _INTRODUCTION.format(
            command=again,
            device=_device(),
            rows="; ".join(
                f"{split}: {', '.join(f'{n:,} {name}' for name, n in count.items())}"
                for split, count in mix["rows"].items()
            )
            + ".",
            passages=f"{mix['passages']:,}",
        )
    ]
    for metric in METRICS:
        parts.append(f"## {metric.replace('_', ' ').capitalize()}\n\n{_table(systems, metric)}\n")
    ceiling = _ceiling(out)
    if ceiling is not None:
        parts.append(
            f"Ceiling: an accepted answer stands in some passage for {ceiling:.1%} of them.\n"
        )
    parts.append(f"## Differences in exact match, paired by question\n\n{_against(differences)}\n")
    if (table := out / "ablation" / "ablation.md").exists():
        parts.append(f"## Masks\n\n{table.read_text(encoding='utf-8')}")
    if (out / "algorithms").exists():
        parts.append("![curves](results.svg)\n")
    listed = "\n".join(command for command in commands.values())
    parts.append(f"## The commands behind it\n\n```bash\n{listed}\n```\n")
    return "\n".join(parts)


def _table(systems: Mapping[str, Any], metric: str) -> str:
    lines = []
    for name, seeds in systems.items():
        runs = list(seeds.values())
        cells = [_mean(runs, dataset, metric) for dataset in TESTED]
        count = f" ({len(runs)} seeds)" if len(runs) > 1 else ""
        mean = sum(cell.mean for cell in cells) / len(cells)
        lines.append([f"{name}{count}", *map(_with_ends, cells), number(mean)])
    sizes = [f"{name}, n={len(_any(systems)[name][metric])}" for name in TESTED]
    return markdown(["system", *sizes, "mean"], lines)


def _any(systems: Mapping[str, Any]) -> dict[str, Scores]:
    return next(iter(next(iter(systems.values())).values()))


def _against(differences: Sequence[Mapping[str, Any]]) -> str:
    by_pair: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for line in differences:
        if line["metric"] == "exact_match":
            interval = Interval(line["difference"], *line["ci95"], line["n"])
            by_pair[line["system"], line["versus"]][line["dataset"]] = _with_ends(interval, "+")
    lines = [[*pair, *(cells[name] for name in TESTED)] for pair, cells in by_pair.items()]
    return markdown(["system", "against", *TESTED], lines)


def _with_ends(interval: Interval, sign: str = "") -> str:
    ends = f"{number(interval.low, sign)}, {number(interval.high, sign)}"
    return f"{number(interval.mean, sign)} [{ends}]"


def _ceiling(out: Path) -> float | None:
    path = out / "baselines" / "eval.json"
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["corpus"]["answer_coverage"]


def curves(out: Path, path: Path) -> None:
    """Draw exact match of the sampled episodes by step, where matplotlib is there."""
    logs = sorted((out / "algorithms").glob("*/seed*/metrics.jsonl"))
    if not logs:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curves: matplotlib is not installed; pip install 'agentr1[plot]'")
        return
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for log in logs:
        lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        points = [(r["step"], r[_CURVE]) for r in lines if _CURVE in r]
        axes.plot(*zip(*points, strict=True), label=f"{log.parts[-3]}, {log.parts[-2]}", lw=1)
    axes.set(xlabel="optimizer step", ylabel="exact match of sampled episodes")
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path)


_CURVE = "rollout/exact_match"
