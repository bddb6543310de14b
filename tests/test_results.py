"""The project's own results: their stages are commands that exist, their report adds up."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks.results import __main__ as results
from benchmarks.results import mix
from benchmarks.results import report as report_module
from benchmarks.results import stages as stages_module
from benchmarks.results.report import seeds_of, write_report
from benchmarks.results.stages import METRICS, RL, SCALES, Scale, Stage, stages

from agentr1.ablate import ROWS
from agentr1.eval_folder import fingerprint
from agentr1.recipe import load_recipe
from agentr1.runs import write_header, write_json, write_scores
from agentr1.scoring import Scored
from agentr1.types import Message, StopReason, Trajectory, Turn
from trainers import save_policy

SETS = ("hotpotqa", "2wiki", "musique")


def overrides_of(stage: Stage) -> list[str]:
    """What a grid's command hands to its recipes."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--recipes", "--seeds"):
        parser.add_argument(name, nargs="+")
    for name in ("--jobs", "--out"):
        parser.add_argument(name)
    parser.add_argument("--no-plot", action="store_true")
    return parser.parse_known_args(stage.words[3:])[1]


CPU = ("--use_cpu", "true", "--bf16", "false")


@pytest.mark.parametrize("scale", list(SCALES))
def test_what_the_stages_override_are_keys_of_the_recipes(tmp_path: Path, scale: str) -> None:
    found = {stage.name: stage for stage in stages(tmp_path, "hub", scale, [1], 1)}
    given = overrides_of(found["algorithms"])
    for name in RL:
        recipe = load_recipe(f"multihop/{name}", [*CPU, *given])
        recipe.training.check_for_environment()
        two = recipe.training.steps_per_generation // recipe.training.gradient_accumulation_steps
        assert two == (2 if name == "ppo" and scale == "gpu" else 1)
        assert recipe.arguments.metrics == list(METRICS)


def test_no_cell_of_the_ablation_is_refused_in_mixed_precision(tmp_path: Path) -> None:
    stage = stages(tmp_path, "hub", "gpu", [1], 1)[-1]
    assert stage.name == "ablation"
    for row in ROWS:
        keys = [word for key, value in row.settings.items() for word in (f"--{key}", value)]
        recipe = load_recipe(
            f"multihop/{row.algorithm}", [*overrides_of(stage), *keys, "--use_cpu", "true"]
        )
        assert recipe.training.bf16
        recipe.training.check_for_environment()


def test_the_mix_keeps_tested_questions_out_of_training(tmp_path: Path) -> None:
    for name in SETS:
        for split, count in (("train", 300), ("dev", 8)):
            lines = [
                {"id": f"{name}-{split}-{i}", "question": f"{split} {i} of {name}?", "source": name}
                for i in range(count)
            ]
            write_lines(tmp_path / name / f"{split}.jsonl", lines)
        write_lines(tmp_path / name / "corpus.jsonl", [{"id": "p", "title": "T", "text": "t"}])
    asked = {"id": "again", "question": "The dev 3 of 2Wiki", "source": "hotpotqa"}
    with (tmp_path / "hotpotqa" / "train.jsonl").open("a") as file:
        file.write(json.dumps(asked) + "\n")
    mix.main([str(tmp_path), "--questions", "8"])
    rows = {s: read_lines(tmp_path / "data" / f"{s}.jsonl") for s in ("train", "dev", "test")}
    assert len(rows["test"]) == 24
    assert len(rows["dev"]) == mix.HELD_OUT
    assert len(rows["train"]) == 600 - mix.HELD_OUT
    ids = [row["id"] for part in rows.values() for row in part]
    assert len(set(ids)) == len(ids)
    assert "again" not in ids
    assert len(read_lines(tmp_path / "data" / "corpus.jsonl")) == 1
    record = json.loads((tmp_path / "data" / "mix.json").read_text())
    assert record["trained_and_tested_left_out"] == 1
    assert {row["source"] for row in rows["test"][:12]} == set(SETS)  # a limit takes of each
    write_lines(tmp_path / "2wiki" / "corpus.jsonl", [{"id": "p", "title": "U", "text": "t"}])
    with pytest.raises(SystemExit, match="another passage 'p' is in an earlier corpus"):
        mix.main([str(tmp_path), "--questions", "8"])


def write_lines(path: Path, records: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Pieces ------------------------------------------------------------------------------------------

SLEEPER = """
import pathlib, signal, sys, time
made = pathlib.Path(sys.argv[1])
def save(*_):
    made.with_suffix(".saved").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
made.with_suffix(".begun").touch()
time.sleep(float(sys.argv[2]))
made.touch()
"""


def sleeper(folder: Path, seconds: float) -> Stage:
    (folder / "sleeper.py").write_text(SLEEPER)
    made = folder / "made"
    return Stage("sleep", ("sleeper", str(made), str(seconds)), made.exists)


def test_a_stage_is_stopped_in_good_time_and_the_next_piece_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(results, "PATIENCE", 5.0)
    stage = sleeper(tmp_path, 60)
    assert results.carry_out(stage, time.monotonic() + 4) == results.TIME_IS_UP
    assert not (tmp_path / "made.begun").exists()  # no time for it
    assert results.carry_out(stage, time.monotonic() + 7) == results.TIME_IS_UP
    assert (tmp_path / "made.saved").exists()
    stage = sleeper(tmp_path, 0)
    assert results.carry_out(stage, math.inf) == 0
    assert stage.done()


def test_a_signal_is_passed_on_to_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def press() -> None:
        while not (tmp_path / "made.begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=press).start()
    try:
        assert results.carry_out(sleeper(tmp_path, 60), math.inf) == 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert (tmp_path / "made.saved").exists()


def test_another_plan_and_a_second_process_are_refused(tmp_path: Path) -> None:
    plan = {"source": "hub", "scale": "gpu", "settings": {"questions": 3, "sft": ("a",)}}
    with results.alone_in(tmp_path):
        results.agree(tmp_path, plan)
        results.agree(tmp_path, plan)
        with pytest.raises(SystemExit, match=r"another source: .*'hub'.*'elsewhere'"):
            results.agree(tmp_path, plan | {"source": "elsewhere"})
        with pytest.raises(SystemExit, match="another settings"):
            results.agree(tmp_path, plan | {"settings": {"questions": 4, "sft": ("a",)}})
        with pytest.raises(SystemExit, match="another process"), results.alone_in(tmp_path):
            pass


def test_a_stage_that_others_were_made_from_is_not_made_again(tmp_path: Path) -> None:
    todo = {stage.name: stage for stage in stages(tmp_path, "hub", "cpu", [1], 1)}
    every = list(todo.values())
    for name in ("coldstart", "baselines", "algorithms", "hotpotqa"):
        results.refuse_to_renew(todo[name], every, tmp_path)
    write_json(tmp_path / "baselines" / "eval.json", {})
    results.refuse_to_renew(todo["algorithms"], every, tmp_path)
    results.refuse_to_renew(todo["baselines"], every, tmp_path)
    with pytest.raises(SystemExit, match="coldstart has to be made, but baselines in"):
        results.refuse_to_renew(todo["coldstart"], every, tmp_path)
    (tmp_path / "baselines" / "eval.json").unlink()
    write_json(tmp_path / "algorithms" / "grpo" / "seed1" / "checkpoint-2" / "x.json", {})
    results.refuse_to_renew(todo["algorithms"], every, tmp_path)  # it goes on from there
    with pytest.raises(SystemExit, match="coldstart has to be made, but algorithms in"):
        results.refuse_to_renew(todo["coldstart"], every, tmp_path)


def test_an_evaluation_of_earlier_weights_is_not_taken_for_one_of_these(tmp_path: Path) -> None:
    stage = next(s for s in stages(tmp_path, "hub", "cpu", [1], 1) if s.name == "ppo-seed1")
    weights = tmp_path / "algorithms" / "ppo" / "seed1" / "final" / "model.safetensors"
    folder = tmp_path / "tests" / "ppo" / "seed1"
    assert stage.words[stage.words.index("--model") + 1] == str(weights.parent)
    assert stage.words[stage.words.index("--out") + 1] == str(folder)
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"first")
    assert not stage.done()
    settings = {"policy": {"weights": fingerprint(weights.parent)}}
    write_json(folder / "evaluation" / "settings.json", settings)
    assert not stage.done()  # not yet over
    write_json(folder / "eval.json", {})
    assert stage.done()
    weights.write_bytes(b"again")
    assert not stage.done()


def test_a_grid_is_done_with_the_seeds_that_are_asked_for(tmp_path: Path) -> None:
    for name in RL:
        for seed in (1, 2):
            write_json(tmp_path / "algorithms" / name / f"seed{seed}" / "eval.json", {})

    def done(*seeds: int) -> bool:
        found = {stage.name: stage for stage in stages(tmp_path, "hub", "cpu", seeds, 1)}
        return found["algorithms"].done()

    assert done(1)
    assert done(1, 2)
    assert not done(1, 3)


def test_a_report_alone_begins_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main(["--report", "--out", str(tmp_path), "--scale", "cpu"]) == 0
    assert "nothing has been evaluated yet" in capsys.readouterr().out
    assert not (tmp_path / "cpu" / "plan.json").exists()


# Report ------------------------------------------------------------------------------------------


def answered(right: Sequence[bool]) -> list[Scored]:
    """The same three questions of each set, by whether they were answered."""
    found = []
    for name in SETS:
        for i, correct in enumerate(right):
            row = {"id": f"{name}{i}", "source": name, "answers": ["x"]}
            turn = Turn((1,), (0.0,), Message("assistant", "x"), (), prompt_ids=(1,))
            episode = Trajectory(row, (), (turn,), StopReason.ENVIRONMENT)
            values = dict.fromkeys(("exact_match", "cover_exact_match", "f1"), float(correct))
            found.append(Scored(row["id"], values, episode))
    return found


def test_the_report_pairs_every_seed_with_the_cold_start(tmp_path: Path) -> None:
    out, docs = tmp_path / "out", tmp_path / "docs"
    write_json(out / "data" / "mix.json", {"rows": {"train": {"hotpotqa": 5}}, "passages": 9})
    for name, right in {"after": [0, 0, 1], "naive_rag": [0, 0, 0]}.items():
        write_scores(out / "baselines" / "evaluation" / f"{name}.jsonl", answered(right))
    write_json(
        out / "baselines" / "eval.json", {"breakdown": {"source": {"2wiki": {"ceiling": 0.75}}}}
    )
    write_header(out / "baselines", "", ["x"])
    for seed, right in {1: [1, 1, 0], 2: [1, 1, 1]}.items():
        run, folder = (out / part / "grpo" / f"seed{seed}" for part in ("algorithms", "tests"))
        write_header(run, "", ["x", "--use_cpu", "true"])
        write_json(run / "checkpoint-7" / "trainer_state.json", {"global_step": 7})
        write_scores(run / "evaluation" / "after.jsonl", answered([0, 0, 0]))  # a look
        (run / "metrics.jsonl").write_text(
            '{"num_tokens": 5, "rollout/exact_match": 0.5}\n{"num_tok'  # killed while it wrote
        )
        write_scores(folder / "evaluation" / "after.jsonl", answered(right))
        write_json(run / "final" / "config.json", {"seed": seed})
        settings = {"policy": {"weights": fingerprint(run / "final")}}
        write_json(folder / "evaluation" / "settings.json", settings)
        write_json(folder / "eval.json", {})
    todo = stages(out, "hub", "gpu", [1, 2], 1)
    assert seeds_of(out) == [1, 2]
    write_report(out, todo, {"source": "hub", "scale": "gpu"}, docs)
    records = json.loads((docs / "results.json").read_text())
    scores = {
        (r["system"], r["seed"]): r["value"]
        for r in records
        if "value" in r and (r["dataset"], r["metric"]) == ("2wiki", "exact_match")
    }
    assert scores == pytest.approx(
        {
            ("cold_start", None): 1 / 3,
            ("naive_rag", None): 0.0,
            ("grpo", 1): 2 / 3,
            ("grpo", 2): 1.0,
            ("grpo", None): 5 / 6,
        }
    )
    differences = {
        (r["system"], r["versus"]): r["difference"]
        for r in records
        if "versus" in r and (r["dataset"], r["metric"]) == ("2wiki", "exact_match")
    }
    assert differences == pytest.approx(
        {
            ("grpo", "naive_rag"): 5 / 6,
            ("grpo", "cold_start"): 0.5,
            ("cold_start", "naive_rag"): 1 / 3,
        }
    )
    assert {r["steps"] for r in records if r["system"] == "grpo" and "steps" in r} == {7}
    commands = {r["seed"]: r["command"] for r in records if r["system"] == "grpo" and "seed" in r}
    assert ["grpo/seed2/final" in commands[seed] for seed in (1, 2, None)] == [False, True, True]
    assert {r["device"] for r in records if "device" in r} == {f"{os.cpu_count()} CPU cores"}
    page = (docs / "results.md").read_text()
    assert "2wiki, n=3, ceiling .750" in page
    assert "in no table: ppo, rloo, reinforce_pp, reinforce_pp_baseline." in page
    assert "make results ARGS='--source hub --scale gpu'" in page
    assert "ahead of it: none; behind it: none." in page  # three questions tell nothing apart
    write_json(out / "algorithms" / "grpo" / "seed2" / "final" / "config.json", {"trained": "anew"})
    assert seeds_of(out) == [1]


# Everything ---------------------------------------------------------------------------------------


def own_set(folder: Path, name: str) -> None:
    """Questions over two passages each, of which every demonstration's searches find both."""
    corpus = []
    for split, count in (("train", 110), ("dev", 3)):
        rows = []
        for i in range(count):
            child, mother, town = (
                f"{name} {split} {i} Fisher",
                f"Old {split} {i} {name}",
                f"Ulm {i}",
            )
            corpus += [
                {"id": child, "title": child, "text": f"She is a daughter of {mother}."},
                {"id": mother, "title": mother, "text": f"She was born in Ulm {i}."},
            ]
            question = f"Where was the mother of {child} born?"
            titles = [child, mother]
            answers = {"answers": [town], "supporting_titles": titles, "hops": 2}
            rows.append(
                {"id": f"{name}{split}{i}", "question": question, "source": name, **answers}
            )
        write_lines(folder / name / f"{split}.jsonl", rows)
    write_lines(folder / name / "corpus.jsonl", corpus)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_one_command_goes_from_data_to_the_table_and_then_does_nothing_twice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    make_model: Callable[..., Any],
    tokenizer: Any,
) -> None:
    for name in SETS:
        own_set(tmp_path / "source", name)
    base = save_policy(tmp_path / "SmolLM2-tiny", make_model(), tokenizer)
    short = ("--max_completion_length", "256", "--max_turn_tokens", "32")
    small = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    tiny = Scale(
        questions=2,
        demonstrations=4,
        ablation=False,
        everywhere=("--use_cpu", "true", "--bf16", "false", "--search_passage_chars", "60"),
        sft=("--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", *small),
        play=short,
        rl=("--max_steps", "2", "--save_steps", "1", "--num_generations", "4", *small, *short),
        at_once=8,
    )
    repository = Path(results.__file__).parents[2]
    monkeypatch.setattr(results, "ROOT", tmp_path)  # where docs/ are written
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository), str(repository / "src")]))
    monkeypatch.setitem(SCALES, "cpu", tiny)
    monkeypatch.setattr(stages_module, "BASE", str(base))
    monkeypatch.setattr(stages_module, "LOOK", ("--test_limit", "1"))
    for module in (stages_module, report_module):
        monkeypatch.setattr(module, "RL", ("grpo", "ppo"))
    command = ["--source", "source", "--scale", "cpu", "--seeds", "1", "--out", "out"]
    monkeypatch.chdir(tmp_path)
    assert results.main(command) == 0
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "make results ARGS='--source PATH --scale cpu --seeds 1'" in page
    assert "agentr1 data musique --source PATH" in page
    records = json.loads((tmp_path / "docs" / "results.json").read_text())
    systems = {r["system"] for r in records}
    assert systems == {"cold_start", *stages_module.BASELINES, "grpo", "ppo"}
    assert {r["dataset"] for r in records} == set(SETS)
    assert {r["steps"] for r in records if r["system"] == "ppo" and "steps" in r} == {2}
    assert (tmp_path / "docs" / "results.svg").exists()
    looks, tests = ((tmp_path / "out" / "cpu" / part) for part in ("algorithms", "tests"))
    for name in ("grpo", "ppo"):
        assert json.loads((looks / name / "seed1" / "eval.json").read_text())["after"]["n"] == 1
        assert json.loads((tests / name / "seed1" / "eval.json").read_text())["n"] == 6
    capfd.readouterr()
    assert results.main(command) == 0
    said = capfd.readouterr().out
    assert said.count("done before") == 11
    assert "took" not in said
    assert (tmp_path / "docs" / "results.md").read_text() == page


def test_the_verdict_names_the_right_side() -> None:
    ends = {"grpo": [0.1, 0.2], "ppo": [-0.2, -0.1], "rloo": [-0.1, 0.1]}
    about = {"versus": "cold_start", "dataset": "2wiki", "metric": "exact_match"}
    said = report_module._verdict([{"system": s, "ci95": e} | about for s, e in ends.items()])
    assert said.endswith("ahead of it: grpo on 2wiki; behind it: ppo on 2wiki.")


def test_steps_are_those_of_the_newest_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        write_json(tmp_path / f"checkpoint-{step}" / "trainer_state.json", {"global_step": step})
    assert report_module.steps(tmp_path) == 10
    assert report_module.steps(tmp_path / "none") == 0
