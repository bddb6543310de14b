"""What the trainings and evaluations gave: docs/results.json, docs/results.md and the curves."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentr1.cells import markdown, number
from agentr1.recipe import metric_name
from agentr1.runs import stream_scores, write_json, write_text
from agentr1.scoring import Outcome, outcome
from agentr1.statistics import Interval, mean_over_runs, paired_difference_over_runs
from benchmarks.results.mix import TESTED
from benchmarks.results.stages import BASELINES, RL, Stage, is_of, tested
from benchmarks.results.stages import METRICS as PATHS

METRICS = tuple(map(metric_name, PATHS))
AGAINST = ("naive_rag", "base_tool_call", "few_shot", "cold_start")
_FILES = {"cold_start": "after"} | {name: name for name in BASELINES}
"""System to its transcripts among the baselines'."""

Seeds = dict[int | None, list[Outcome]]
"""Seed to what was answered; None for a system that was not trained with one."""


def write_report(out: Path, stages: Sequence[Stage], plan: Mapping[str, Any], docs: Path) -> None:
    """Write docs/results.* from whatever is there."""
    systems = dict(_systems(out))
    if not systems:
        print("nothing has been evaluated yet")
        return
    commands = {stage.name: stage.shown for stage in stages}
    records = [*_scores(out, systems, commands), *_differences(systems)]
    write_json(docs / "results.json", records)
    write_text(docs / "results.md", page(out, systems, records, commands, plan))
    curves(out, docs / "results.svg")
    print(f"docs/results.json and results.md: {len(systems)} systems, {len(records)} records")


def _systems(out: Path) -> Iterator[tuple[str, Seeds]]:
    """Every system that has been evaluated to the end."""
    for name, file in _FILES.items():
        path = out / "baselines" / "evaluation" / f"{file}.jsonl"
        if (out / "baselines" / "eval.json").exists() and path.exists():
            yield name, {None: _outcomes(path)}
    for name in RL:
        if found := {
            seed: _outcomes(tested(out, name, seed) / "evaluation" / "after.jsonl")
            for seed in seeds_of(out, name)
        }:
            yield name, found


def seeds_of(out: Path, name: str = "*") -> list[int]:
    """The seeds of the trainings, of one algorithm or of any, that have been tested."""
    tests = (path.parent for path in (out / "tests").glob(f"{name}/seed*/eval.json"))
    found = [
        test.name
        for test in tests
        if is_of(test, out / "algorithms" / test.parent.name / test.name / "final")
    ]
    return sorted({int(folder.removeprefix("seed")) for folder in found})


def _outcomes(path: Path) -> list[Outcome]:
    return [outcome(scored) for scored in stream_scores(path)]


def _values(answered: Sequence[Outcome], dataset: str, metric: str) -> dict[str, float]:
    """Row id to value, on the rows of one data set."""
    return {o.row_id: o.values[metric] for o in answered if o.row["source"] == dataset}


def _mean(runs: Sequence[Sequence[Outcome]], dataset: str, metric: str) -> Interval:
    return mean_over_runs([_values(run, dataset, metric) for run in runs])


def _scores(
    out: Path, systems: Mapping[str, Seeds], commands: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """One score of one system on one data set; seed null is the mean over all."""
    for name, seeds in systems.items():
        trained = None not in seeds
        chosen: list[tuple[int | None, list[list[Outcome]]]] = [
            (seed, [answered]) for seed, answered in seeds.items()
        ]
        if trained and len(seeds) > 1:
            chosen.append((None, list(seeds.values())))
        run = out / "algorithms" / name / f"seed{min(seeds)}" if trained else out / "coldstart"
        learned = trained or name == "cold_start"
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
                        "steps": steps(run) if learned else 0,
                        "device": device(run if trained else out / "baselines"),
                        "command": _command(commands, name, [s for s in seeds if seed in (s, None)])
                        if trained
                        else commands["baselines"],
                    }


def _command(commands: Mapping[str, str], name: str, seeds: Sequence[int | None]) -> str:
    """What trains a system, and what tests it."""
    return " && ".join([commands["algorithms"], *(commands[f"{name}-seed{s}"] for s in seeds)])


def _differences(systems: Mapping[str, Seeds]) -> Iterator[dict[str, Any]]:
    """Every trained system against those that were not, and the cold start against the others."""
    for name in (*RL, "cold_start"):
        for other in AGAINST:
            if name == other or name not in systems or other not in systems:
                continue
            runs, base = list(systems[name].values()), systems[other][None]
            for dataset in TESTED:
                for metric in METRICS:
                    interval = paired_difference_over_runs(
                        [_values(run, dataset, metric) for run in runs],
                        [_values(base, dataset, metric)] * len(runs),
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


def steps(run: Path) -> int:
    """Optimizer steps of a training."""
    states = [json.loads(s.read_text("utf-8")) for s in run.glob("checkpoint-*/trainer_state.json")]
    return max((state["global_step"] for state in states), default=0)


def device(run: Path) -> str:
    """What a run ran on, by its own record."""
    record = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    on_cpu = "--use_cpu true" in (run / "command.txt").read_text(encoding="utf-8")
    cores = f"{record['cpus']} CPU cores"
    return cores if on_cpu else record["gpu"] or cores


# The page ----------------------------------------------------------------------------------------

_INTRODUCTION = """# Results on real questions

SmolLM2-135M-Instruct learns to search and to answer: a cold start on demonstrations built from the
supporting facts of *train* questions, then reinforcement learning with `recipes/multihop`. One
command makes everything; it may be stopped and given again:

```bash
{command}
```

Trained on {device}, on questions of HotpotQA and 2Wiki; tested greedily on dev questions of these
(in domain) and of MuSiQue (out of domain). {rows}
{source}
A corpus of {passages} passages, BM25, the same for all. These are not the settings of any paper: a
small model, a small corpus that holds the questions' own passages, few train questions. Compare
rows of the tables below with each other and with nothing else; results.json has every figure.
"""
_A_FOLDER = (
    """`PATH` is a folder with files of the three sets; `--source hub` takes the published ones."""
)
_READING = """- Exact match asks for the words alone. A model that was never shown the form answers
  in sentences, and its exact match says little: look at cover-EM, which is lenient and not to be
  put beside exact match. That a trained agent beats an untrained model in it is no more than that.
- `agentr1 eval` tests what each training leaves as it tests the others: the same batches of
  questions, in the same precision.
- `reinforce_pp` asks each question once a batch, so it sees as many questions as the others see
  episodes.
"""


def page(
    out: Path,
    systems: Mapping[str, Seeds],
    records: Sequence[Mapping[str, Any]],
    commands: Mapping[str, str],
    plan: Mapping[str, Any],
) -> str:
    """docs/results.md."""
    mix = json.loads((out / "data" / "mix.json").read_text(encoding="utf-8"))
    options = [f"--{name} {value}" for name, value in plan.items()]
    trained = [name for name in RL if name in systems]
    counts = "; ".join(
        f"{split}: {', '.join(f'{n:,} {name}' for name, n in count.items())}"
        for split, count in mix["rows"].items()
    )
    introduction = _INTRODUCTION.format(
        command=f"make results ARGS='{' '.join(options)}'",
        device=device(out / "algorithms" / trained[0] / f"seed{min(systems[trained[0]])}")
        if trained
        else device(out / "coldstart"),
        rows=f"{counts}.",
        source="" if plan["source"] == "hub" else _A_FOLDER,
        passages=f"{mix['passages']:,}",
    )
    tables = [
        f"## {metric.replace('_', ' ').capitalize()}\n\n{_table(out, systems, metric)}\n"
        for metric in METRICS
    ]
    parts = [introduction, *tables, _READING]
    if absent := [name for name in RL if name not in systems]:
        parts.append(f"Not trained yet, so in no table: {', '.join(absent)}.\n")
    parts.append(f"## What they did\n\n{_conduct(systems)}\n")
    parts.append(f"## Differences in exact match, paired by question\n\n{_against(records)}\n")
    if trained:
        parts.append(f"{_verdict(records)}\n")
    if (masks := out / "ablation" / "ablation.md").exists():
        parts.append(f"## Masks\n\n{masks.read_text(encoding='utf-8')}")
    if trained:
        parts.append("![curves](results.svg)\n")
    listed = "\n".join(commands.values())
    parts.append(f"## The commands behind it\n\n```bash\n{listed}\n```\n")
    return "\n".join(parts)


def _table(out: Path, systems: Mapping[str, Seeds], metric: str) -> str:
    lines = []
    for name, seeds in systems.items():
        cells = [_mean(list(seeds.values()), dataset, metric) for dataset in TESTED]
        count = f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""
        mean = sum(cell.mean for cell in cells) / len(cells)
        lines.append([f"{name}{count}", *map(_with_ends, cells), number(mean)])
    first = next(iter(next(iter(systems.values())).values()))
    sizes = {name: sum(o.row["source"] == name for o in first) for name in TESTED}
    ceilings = _ceilings(out)
    heads = [
        f"{name}, n={sizes[name]}"
        + (f", ceiling {number(ceilings[name])}" if name in ceilings else "")
        for name in TESTED
    ]
    return markdown(["system", *heads, "mean"], lines)


def _conduct(systems: Mapping[str, Seeds]) -> str:
    lines = []
    for name, seeds in systems.items():
        all_of_them = [o for answered in seeds.values() for o in answered]
        n = len(all_of_them)
        calls = sum(o.numbers.get("calls", 0.0) for o in all_of_them) / n
        turns = sum(o.numbers["turns"] for o in all_of_them) / n
        cut = sum(o.numbers["truncated"] for o in all_of_them) / n
        lines.append([name, f"{turns:.2f}", f"{calls:.2f}", f"{cut:.0%}"])
    return markdown(["system", "turns", "calls", "cut off by a limit"], lines)


def _against(records: Sequence[Mapping[str, Any]]) -> str:
    by_pair: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for line in records:
        if "versus" in line and line["metric"] == "exact_match":
            interval = Interval(line["difference"], *line["ci95"], line["n"])
            by_pair[line["system"], line["versus"]][line["dataset"]] = _with_ends(interval, "+")
    lines = [[*pair, *(cells[name] for name in TESTED)] for pair, cells in by_pair.items()]
    return markdown(["system", "against", *TESTED], lines)


def _verdict(records: Sequence[Mapping[str, Any]]) -> str:
    """Which trainings are sure to be better or worse than what they began with."""
    sides: dict[str, list[str]] = {"ahead of": [], "behind": []}
    for line in records:
        if line.get("versus") == "cold_start" and line["metric"] == "exact_match":
            low, high = line["ci95"]
            side = "ahead of" if low > 0 else "behind" if high < 0 else None
            if side:
                sides[side].append(f"{line['system']} on {line['dataset']}")
    said = [f"{side} it: {', '.join(names) or 'none'}" for side, names in sides.items()]
    return f"Against the cold start, by the whole interval, {'; '.join(said)}."


def _with_ends(interval: Interval, sign: str = "") -> str:
    ends = f"{number(interval.low, sign)}, {number(interval.high, sign)}"
    return f"{number(interval.mean, sign)} [{ends}]"


def _ceilings(out: Path) -> dict[str, float]:
    """Data set to the share of its questions whose answer can be read in the corpus as shown."""
    path = out / "baselines" / "eval.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))["breakdown"].get("source", {})
    return {name: part["ceiling"] for name, part in found.items() if part.get("ceiling")}


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
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill cuts the last
        points = [(r["num_tokens"], r[_CURVE]) for r in whole if _CURVE in r]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{log.parts[-3]}, {log.parts[-2]}", lw=1)
    axes.set(xlabel="tokens of all episodes so far", ylabel="exact match of sampled episodes")
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path)


_CURVE = "rollout/exact_match"
