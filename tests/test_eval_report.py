"""The report: the numbers are those of the outcomes, and everything is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentr1.breakdown import breakdown
from agentr1.ceiling import Ceiling
from agentr1.eval_report import plot, report_of, show
from agentr1.scoring import Outcome

NUMBERS = {
    "turns": 2.0,
    "calls": 1.0,
    "prompt_tokens": 30.0,
    "generated_tokens": 10.0,
    "observation_tokens": 20.0,
    "faulty_turns": 0.0,
    "seconds": 0.5,
    "wall_seconds": 0.1,
}


def outcomes(values: list[float], f1: float = 0.5) -> list[Outcome]:
    kinds: list[dict[str, Any]] = [{"hops": 2, "type": "bridge"}, {"hops": 10}, {"hops": 3}, {}]
    return [
        Outcome(f"q{i}", {"exact_match": v, "f1": f1}, NUMBERS, "environment", kinds[i % 4])
        for i, v in enumerate(values)
    ]


SYSTEMS = {
    "policy": outcomes([1.0, 1.0, 1.0, 0.0] * 5),
    "naive_rag": outcomes([0.0, 1.0, 0.0, 0.0] * 5, f1=0.25),
}
CEILING = Ceiling({f"q{i}": i % 4 != 3 for i in range(20)}, "an answer stands there")


def report(ceiling: Ceiling = CEILING) -> dict[str, Any]:
    return report_of(SYSTEMS, ceiling, {"recipe": "x/grpo"})


def test_every_comparison_is_policy_minus_baseline_on_the_same_rows() -> None:
    found = report()["comparisons"]
    assert [(c["system"], c["versus"], c["metric"]) for c in found] == [
        ("policy", "naive_rag", "exact_match"),
        ("policy", "naive_rag", "f1"),
    ]
    exact, f1 = found
    assert exact["difference"] == pytest.approx(0.5)
    assert 0.2 < exact["ci95"][0] < 0.5 < exact["ci95"][1] < 0.8
    assert exact["mcnemar"] == {"only_a": 10, "only_b": 0, "p": pytest.approx(2 / 2**10)}
    assert f1["ci95"] == pytest.approx([0.25, 0.25])
    assert f1["mcnemar"] is None


def test_each_system_has_scores_intervals_and_what_its_episodes_took() -> None:
    made = json.loads(json.dumps(report()))
    assert made["after"] == made["systems"]["policy"]
    rag = made["systems"]["naive_rag"]
    assert (rag["exact_match"], rag["f1"], rag["n"]) == (0.25, 0.25, 20)
    assert rag["wall_seconds"] == pytest.approx(2.0)
    assert rag["prompt_tokens"] == 30.0
    assert rag["stop_reasons"] == {"environment": 20}
    assert made["corpus"] == {"answer_coverage": 0.75, "note": "an answer stands there"}
    assert made["recipe"] == "x/grpo"


def test_rows_without_a_column_are_left_out_of_its_table() -> None:
    tables = breakdown(SYSTEMS, CEILING.covered)
    assert list(tables) == ["hops", "type"]
    assert list(tables["hops"]) == ["2", "3", "10"]  # numbers in their own order
    assert [kind["n"] for kind in tables["hops"].values()] == [5, 5, 5]
    two = tables["hops"]["2"]
    assert two["systems"]["policy"]["exact_match"] == {"mean": 1.0, "ci95": [1.0, 1.0]}
    assert two["systems"]["naive_rag"]["exact_match"]["mean"] == 0.0
    assert two["ceiling"] == 1.0
    assert tables["type"]["bridge"]["n"] == 5
    assert breakdown({"policy": [SYSTEMS["policy"][3]]}) == {}


def test_the_tables_show_every_system_metric_and_kind(capsys: pytest.CaptureFixture[str]) -> None:
    show(report(), "x/grpo on test, n=20")
    shown = capsys.readouterr().out
    for part in ("x/grpo on test, n=20", "policy", "naive_rag", "exact_match", "f1", "0.750"):
        assert part in shown
    assert "+0.500 [" in shown
    assert "environment 20" in shown
    assert "exact_match by hops" in shown
    assert "by type" not in shown  # one kind of question is no comparison
    show(report(Ceiling(None, "not known, there is no search tool")), "y")
    shown = " ".join(capsys.readouterr().out.split())  # long lines are wrapped
    assert "not known, there is no search tool" in shown


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot(report(), tmp_path / "eval")
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "eval.svg").read_text()
    assert "<svg" in drawn
