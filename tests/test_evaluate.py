"""The verb on the shipped tiny policy: every system, stopped and gone on, in any order."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import agentr1.evaluate
from agentr1.compare import main as compare
from agentr1.evaluate import Options, drawn, evaluate, main
from agentr1.runs import stream_scores
from agentr1.systems import SYSTEMS
from test_systems import TALK

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data" / "quickstart"
N = 10
PLAYED = ["policy", "naive_rag", "base_tool_call"]


def dataset(folder: Path, order: Sequence[int]) -> Path:
    """The quickstart with its first test rows in another order."""
    folder.mkdir()
    lines = (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(lines[i] for i in order), encoding="utf-8")
    for name in ("train.jsonl", "dev.jsonl", "corpus.jsonl"):
        shutil.copy(DATA / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    dataset(root / "data", range(N))
    shutil.copytree(DATA / "policy", root / "trained")
    (root / "talks.jsonl").write_text((json.dumps({"messages": TALK}) + "\n") * 2)
    return root


def run(
    here: Path, out: Path | None, *overrides: str, model: str = "trained", **options: Any
) -> Path:
    words = ["--use_cpu", "true", "--dataset", str(here / "data"), *overrides]
    given = {"baselines": PLAYED[1:], "at_once": 4} | options
    return evaluate("quickstart", words, str(here / model), Options(out=out, **given))


@pytest.fixture(scope="module")
def whole(here: Path) -> Path:
    """An evaluation that nobody disturbed."""
    return run(here, here / "whole")


def answers(folder: Path) -> dict[str, Any]:
    """Tokens, probabilities and scores of every system and question, to the last bit."""
    return {
        name: {
            s.row_id: (s.values, [(t.action_ids, t.logprobs) for t in s.trajectory.turns])
            for s in stream_scores(folder / "evaluation" / f"{name}.jsonl")
        }
        for name in ("after", *PLAYED[1:])
    }


def untimed(folder: Path) -> dict[str, Any]:
    """A report without what a clock measured."""
    report = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    for system in (report["after"], *report["systems"].values()):
        for name in [name for name in system if "seconds" in name]:
            del system[name]
    return report


def test_all_systems_are_played_scored_and_compared(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = agentr1.evaluate.load_weights
    monkeypatch.setattr(
        agentr1.evaluate, "load_weights", lambda *a: loaded.append(a[0].path_or_id) or load(*a)
    )
    out = here / "every"
    extra = {"baselines": ["all"], "cold_start": str(here / "trained"), "limit": 6}
    run(here, out, "--demonstrations", str(here / "talks.jsonl"), **extra)
    assert len(loaded) == 2  # the policy's, also the cold start's, and the recipe's own
    report = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    assert list(report["systems"]) == list(SYSTEMS)
    assert report["n"] == report["after"]["n"] == 6
    assert report["budget"]["passages"] == 8
    assert report["corpus"]["answer_coverage"] == 1.0
    assert report["systems"]["cold_start"]["exact_match"] == report["after"]["exact_match"] > 0
    assert report["systems"]["closed_book"]["turns"] == 1
    assert {c["versus"] for c in report["comparisons"]} == set(SYSTEMS) - {"policy"}
    assert list(report["breakdown"]) == ["hops", "type"]
    prompts = {name: s["prompt_tokens"] for name, s in report["systems"].items()}
    assert prompts["few_shot"] > prompts["base_tool_call"]
    assert prompts["naive_rag"] > prompts["closed_book"]
    for name in ("after", *SYSTEMS):
        if name != "policy":
            assert len((out / "evaluation" / f"{name}.jsonl").read_text().splitlines()) == 6
    assert (out / "recipe.yaml").is_file()
    shown = capsys.readouterr().out
    assert "n=6" in shown
    assert "8 passages of 336 tokens" in shown


def test_the_order_of_questions_changes_nothing(here: Path, whole: Path, tmp_path: Path) -> None:
    order = random.Random(3).sample(range(N), k=N)
    dataset(tmp_path / "data", order)
    shuffled = run(here, tmp_path / "out", "--dataset", str(tmp_path / "data"))
    assert answers(shuffled) == answers(whole)
    values = answers(whole)["after"]
    assert len(values) == N
    assert any(len(turns) > 2 for _, turns in values.values())


def test_a_limit_takes_the_same_questions_whatever_the_order_of_the_file() -> None:
    rows = [{"id": f"{kind}{i}"} for kind in ("hotpot", "wiki") for i in range(20)]
    few, some = drawn(rows, 8), drawn(random.Random(1).sample(rows, k=40), 16)
    assert drawn(rows[::-1], 8) == few == sorted(few, key=lambda row: row["id"])
    assert [row for row in some if row in few] == few
    assert {row["id"][:4] for row in few} == {"hotp", "wiki"}
    assert drawn(rows, None) == drawn(rows, 99) == sorted(rows, key=lambda row: row["id"])


def test_a_limit_draws_from_all_rows_of_a_split_and_not_from_those_of_the_recipe(
    here: Path, tmp_path: Path
) -> None:
    dataset(tmp_path / "data", range(N))
    words = ("--dataset", str(tmp_path / "data"), "--test_limit", "2")
    folder = run(here, tmp_path / "out", *words, baselines=(), limit=4)
    lines = (tmp_path / "data" / "test.jsonl").read_text().splitlines()
    played = [s.row_id for s in stream_scores(folder / "evaluation" / "after.jsonl")]
    assert played == [row["id"] for row in drawn([json.loads(line) for line in lines], 4)]


def test_dev_rows_are_not_called_test_rows(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path / "data", range(3))
    shutil.move(tmp_path / "data" / "test.jsonl", tmp_path / "data" / "dev.jsonl")
    words = ("--dataset", str(tmp_path / "data"))
    folder = run(here, tmp_path / "out", *words, baselines=())
    assert json.loads((folder / "eval.json").read_text())["split"] == "dev"
    assert "on dev, n=3" in capsys.readouterr().out
    dataset(tmp_path / "both", range(3))
    words = ("--dataset", str(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"rows was '3 of dev, .*' and is '3 of test"):
        run(here, tmp_path / "out", *words, baselines=())


@pytest.mark.usefixtures("ctrl_c")
def test_an_evaluation_that_was_interrupted_goes_on_to_the_very_same_end(
    here: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    path = out / "evaluation" / "naive_rag.jsonl"

    def interrupt() -> None:
        while not path.is_file():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt, match=f"same command with --out {out} goes on"):
        run(here, out)
        time.sleep(1)  # a late signal is still ours
    watcher.join()
    assert not (out / "eval.json").exists()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"schema": 1, "id": "test-0008", "val')  # as a kill leaves it
    run(here, out)
    assert answers(out) == answers(whole)
    assert untimed(out) == untimed(whole)


def test_what_is_done_is_not_played_again_and_systems_can_be_added(
    here: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "moved"
    shutil.copytree(whole, out)
    dataset(tmp_path / "data", range(N - 1, -1, -1))
    elsewhere = ["--dataset", str(tmp_path / "data")]  # the same questions and passages
    with monkeypatch.context() as patched:
        patched.delattr(agentr1.evaluate, "load_weights")
        run(here, out, *elsewhere)
        assert "n=10" in capsys.readouterr().out
    talks = ["--demonstrations", str(here / "talks.jsonl")]
    run(here, out, *talks, baselines=["few_shot"])
    assert answers(out) == answers(whole)
    systems = json.loads((out / "eval.json").read_text())["systems"]
    assert set(systems) == {*PLAYED, "few_shot"}


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["--max_turns", "4"], {}, "policy with other settings: limits.max_turns was 5 and is 4"),
        ([], {"limit": 3}, "rows was '10 of test, .*' and is '3 of test"),
        ([], {"sample": 0.5}, "sample was 0.0 and is 0.5"),
        ([], {"at_once": 5}, "at_once was 4 and is 5"),
        (["--dtype", "bfloat16"], {}, "dtype was 'float32' and is 'bfloat16'"),
        (["--system_prompt", "Hi."], {}, r"arguments.system_prompt was .*and is 'Hi\.'"),
    ],
)
def test_other_settings_do_not_go_on(
    here: Path, whole: Path, words: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(here, whole, *words, **options)


def test_another_corpus_does_not_go_on(here: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "data", tmp_path / "data")
    with (tmp_path / "data" / "corpus.jsonl").open("a", encoding="utf-8") as corpus:
        corpus.write('{"id": "new", "title": "New", "text": "A passage more."}\n')
    with pytest.raises(ValueError, match="policy with other settings: corpus was"):
        run(here, whole, "--dataset", str(tmp_path / "data"))


def test_the_ceiling_is_that_of_what_a_search_shows(here: Path, whole: Path) -> None:
    def coverage(*words: str) -> float:
        out = here / f"ceiling{len(words)}"
        run(here, out, "--max_turns", "1", *words, baselines=(), limit=4)
        return json.loads((out / "eval.json").read_text())["corpus"]["answer_coverage"]

    assert coverage() == 1.0
    assert coverage("--search_passage_chars", "5") < 1.0


def test_no_fault_at_all_may_be_asked_for(here: Path, tmp_path: Path) -> None:
    run(here, tmp_path / "out", "--max_fault_share", "0", baselines=(), limit=2)


def test_a_policy_that_was_trained_on_does_not_go_on(here: Path, whole: Path) -> None:
    changed = here / "changed"
    shutil.copytree(here / "trained", changed)
    weights = next(changed.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="model was .*trained' and is .*changed'; weights was"):
        run(here, whole, model="changed")


def test_a_retriever_that_is_down_stops_the_evaluation_and_leaves_no_scores(
    here: Path, tmp_path: Path
) -> None:
    words = ["--tools", "failing_tools.mostly", "--max_fault_share", "0.25"]
    with pytest.raises(RuntimeError, match="policy: .* met an infrastructure fault.*--out"):
        run(here, tmp_path / "out", *words, baselines=())
    assert not (tmp_path / "out" / "evaluation" / "after.jsonl").exists()


def test_sampling_is_seeded_by_the_question(here: Path, tmp_path: Path) -> None:
    a, b = (run(here, tmp_path / n, baselines=(), sample=1.0, limit=4) for n in "ab")
    found = [list(stream_scores(f / "evaluation" / "after.jsonl")) for f in (a, b)]
    sampled = [[[t.action_ids for t in s.trajectory.turns] for s in scored] for scored in found]
    assert sampled[0] == sampled[1]
    greedy = list(
        stream_scores(
            run(here, tmp_path / "c", baselines=(), limit=4) / "evaluation" / "after.jsonl"
        )
    )
    assert sampled[0] != [[t.action_ids for t in s.trajectory.turns] for s in greedy]


def test_the_command_writes_a_folder_that_compare_reads(
    here: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    words = ["--use_cpu", "true", "--dataset", "data", "--limit", "5", "--at-once", "4"]
    assert main(["quickstart", "--model", "trained", *words]) == 0
    latest = here / "runs" / "eval" / "quickstart" / "grpo" / "latest"
    assert json.loads((latest / "eval.json").read_text())["after"]["n"] == 5
    capsys.readouterr()
    assert compare([str(latest), str(whole), "--metric", "cover_exact_match"]) == 0
    assert "difference (unpaired)" in capsys.readouterr().out
    assert compare([str(whole), str(whole)]) == 0
    assert "+0.000" in capsys.readouterr().out
    lines = (latest / "evaluation" / "after.jsonl").read_text().splitlines(keepends=True)
    (latest / "evaluation" / "after.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    assert main(["quickstart", "--model", "trained", *words, "--resume"]) == 0
    assert (latest / "evaluation" / "after.jsonl").read_text().count("\n") == 5
    assert len(list(latest.parent.iterdir())) == 2  # the evaluation and the link to it


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--at-once", "0"], "--at-once must be 1 or more"),
        (["--limit", "0"], "--limit must be 1 or more, got 0"),
        (["--resume", "--out", "x"], "--resume goes on in the newest folder"),
        (["--baselines", "oracle"], "unknown ['oracle'], expected all"),
        (["--baselines", "few_shot"], "the recipe names none; add --demonstrations FILE"),
    ],
)
def test_mistakes_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["quickstart", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_the_page_about_it_names_every_option_system_and_key(whole: Path) -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    report = json.loads((whole / "eval.json").read_text(encoding="utf-8"))
    comparison = report["comparisons"][0]
    options = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Options)]
    assert [word for word in options if word not in text] == []
    names = [*SYSTEMS, *report, *comparison, *comparison["mcnemar"]]
    numbers = ["turns", "calls", "prompt_tokens", "seconds_p95", "wall_seconds", "fault_share"]
    assert [name for name in [*names, *numbers] if f"`{name}`" not in text] == []
    assert set(numbers) <= set(report["after"])
