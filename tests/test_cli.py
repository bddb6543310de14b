"""The command line: a user's mistake is one line, and a run leaves everything behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from trl import GRPOConfig

import agentr1
from agentr1.cli import VERBS, main
from agentr1.commandline import guarded
from agentr1.config import AgentConfig
from agentr1.recipe_arguments import RecipeArguments
from trainers import save_policy

SOURCE = Path(agentr1.__file__).parents[1]
RECIPE = """\
model_name_or_path: policy
dataset: data
tools: [agentr1.tools.calculator.calculator]
num_generations: 2
per_device_train_batch_size: 4
max_turns: 2
max_turn_tokens: 6
max_completion_length: 128
algorithm: grpo
max_steps: 2
learning_rate: 1.0e-2
save_steps: 1
logging_steps: 1
gradient_checkpointing: false
bf16: false
use_cpu: true
report_to: none
output_dir: out
"""
REWRITING = (
    "{% for m in messages %}{% if loop.last %}<|im_start|>{% endif %}"
    "{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
)


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Any],
    make_tokenizer: Callable[..., Any],
) -> Path:
    """A working directory with a policy, data and a recipe, as a user has them."""
    root = tmp_path_factory.mktemp("work")
    save_policy(root / "policy", make_model(), make_tokenizer())
    save_policy(root / "rewriting", make_model(), make_tokenizer(REWRITING))
    for name in ("garbage", "rewriting"):
        (root / name).mkdir(exist_ok=True)
        for file in (root / "policy").iterdir():
            if not (root / name / file.name).exists():
                (root / name / file.name).write_bytes(file.read_bytes())
        (root / name / "model.safetensors").write_text("no weights at all")
    (root / "data").mkdir()
    rows = [{"id": f"r{i}", "question": f"{i} + 1?", "answer": str(i + 1)} for i in range(8)]
    for split in ("train", "dev", "test"):
        text = "".join(json.dumps(row | {"id": f"{split}-{row['id']}"}) + "\n" for row in rows)
        (root / "data" / f"{split}.jsonl").write_text(text)
    (root / "r.yaml").write_text(RECIPE)
    return root


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(workplace)
    yield workplace


def run(*argv: str) -> int:
    """The exit code, whichever way the command ends."""
    try:
        return main(argv)
    except SystemExit as end:  # argparse's own
        return int(end.code or 0)


# Verbs -----------------------------------------------------------------------------------------


def test_no_verb_and_help_list_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"], ["help"]):
        assert run(*argv) == 0
        shown = capsys.readouterr().out
        assert all(verb in shown for verb in VERBS)


def test_an_unknown_verb_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("learn") == 2
    assert "error: there is no verb 'learn'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help_and_wants_its_arguments(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(verb, "--help") == 0
    assert f"agentr1 {verb}" in capsys.readouterr().out
    assert run(verb) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "eval", "play", "demonstrate", "sft"])
def test_help_lists_our_keys_of_a_recipe_and_points_to_those_of_trl(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(verb, "--help") == 0
    shown = capsys.readouterr().out
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    ours = [f for f in dataclasses.fields(AgentConfig) if f.name not in inherited]
    kinds: list[Any] = [*dataclasses.fields(RecipeArguments), *([] if verb == "sft" else ours)]
    listed = re.findall(r"^  --(\w+) +\S", shown.partition("that key of the recipe.")[2], re.M)
    assert sorted(listed) == sorted(field.name for field in kinds)
    told = " ".join(shown.split())
    assert all(" ".join(field.metadata["help"].split()[:3]) in told for field in kinds)
    assert ("Model calls of one episode at most. (8)" in told) is (verb != "sft")
    trl = "SFTConfig" if verb == "sft" else "GRPOConfig"
    assert shown.endswith(f"Every key of TRL's {trl} and ModelConfig works too.\n")


# Mistakes --------------------------------------------------------------------------------------

MISTAKES = {
    "unknown key": (["r.yaml", "--no_such_key", "1"], ["no_such_key"]),
    "unknown algorithm": (["r.yaml", "--algorithm", "ppg"], ["'ppg'", "'rloo'", "leave"]),
    "algorithm and loss": (["r.yaml", "--loss_type", "bnpo"], ["'bnpo'", "'grpo'", "remove"]),
    "wrong type": (["r.yaml", "--max_steps", "many"], ["max_steps", "'many'"]),
    "no value": (["r.yaml", "--max_steps"], ["max_steps", "expected one argument"]),
    "out of range": (["r.yaml", "--max_turns", "0"], ["max_turns", "at least 1", "got 0"]),
    "missing recipe": (["nowhere"], ["'nowhere'", "known recipes", "quickstart/grpo"]),
    "missing recipe file": (["nowhere.yaml"], ["'nowhere.yaml'", "looked at"]),
    "missing dataset": (["r.yaml", "--dataset", "nowhere"], ["'nowhere'", "looked at"]),
    "missing split": (["r.yaml", "--dataset", "policy"], ["'train'", "train.jsonl"]),
    "missing corpus": (
        ["r.yaml", "--tools", "agentr1.tools.search.Search.from_corpus"],
        ["no corpus", "corpus.jsonl"],
    ),
    "missing model": (
        ["r.yaml", "--model_name_or_path", "no/such/model"],
        ["'no/such/model'", "was not found"],
    ),
    "empty model folder": (["r.yaml", "--model_name_or_path", "data"], ["data", "config.json"]),
    "tool path": (["r.yaml", "--tools", "no_such.tool"], ["tools", "'no_such.tool'", "resolve"]),
    "reward path": (["r.yaml", "--rewards", "agentr1.rewards.no"], ["rewards", "has no 'no'"]),
    "metric path": (["r.yaml", "--metrics", "agentr1.nope.x"], ["metrics", "has no 'nope'"]),
    "environment path": (["r.yaml", "--environment", "agentr1.Env"], ["environment", "abstract"]),
    "batch and group": (["r.yaml", "--num_generations", "3"], ["(4)", "(3)", "divisible"]),
    "one rollout a group": (["r.yaml", "--num_generations", "1"], ["generations=1", "2 or more"]),
    "nucleus sampling": (["r.yaml", "--top_p", "0.9"], ["top_p=0.9", "temperature"]),
    "loss and process rewards": (
        [
            *("r.yaml", "--loss_type", "luspo", "--algorithm", "grpo"),
            *("--process_rewards", "agentr1.rewards.valid_call"),
        ],
        ["luspo"],
    ),
    "best metric": (
        [
            *("r.yaml", "--load_best_model_at_end", "true", "--eval_strategy", "steps"),
            *("--eval_steps", "1"),
        ],
        ["metric_for_best_model", "eval_exact_match"],
    ),
    "reward weights": (["r.yaml", "--reward_weights", "1", "2"], ["[1.0, 2.0]", "one weight"]),
    "rewriting template": (
        ["r.yaml", "--model_name_or_path", "rewriting"],
        ["chat template of 'rewriting'", "Qwen2.5"],
    ),
    "nothing to resume": (["r.yaml", "--resume"], ["no checkpoint", "without --resume"]),
    "the Trainer's own resume": (
        ["r.yaml", "--resume_from_checkpoint", "out/checkpoint-1"],
        ["resume_from_checkpoint", "--resume"],
    ),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_mistake_is_one_line_and_comes_before_the_weights(
    here: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    # The weights are garbage: whoever reads them fails, as the next test shows.
    options, said = MISTAKES[mistake]
    model = [] if "--model_name_or_path" in options else ["--model_name_or_path", "garbage"]
    output = ["--output_dir", f"run of {mistake}"]
    assert run("train", *options, *model, *output) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    message, hint = shown.err.rstrip("\n").split("\n")
    assert message.startswith("error: ")
    assert hint == "(--debug shows the traceback)"
    for part in said:
        assert part in message
    assert not (here / f"run of {mistake}").exists()


def test_without_a_mistake_the_weights_are_read(here: Path) -> None:
    with pytest.raises(SafetensorError):
        main(["train", "r.yaml", "--model_name_or_path", "garbage", "--output_dir", "o"])


@pytest.mark.parametrize("verb", ["eval", "play", "sft"])
def test_the_other_verbs_are_as_terse(
    here: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert run(verb, "nowhere") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: no recipe 'nowhere'")
    assert "Traceback" not in shown


def test_debug_shows_the_traceback(here: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["train", "nowhere", "--debug"])


def test_a_mistake_ends_the_process_quickly_and_without_a_traceback(here: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "agentr1", "train", "r.yaml", "--algorithm", "ppg"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)},
        timeout=100,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert "unknown algorithm 'ppg'" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    # Processor time, which other jobs on the machine do not lengthen.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30


@pytest.mark.parametrize(
    ("raised", "code"),
    [(ValueError("x"), 2), (FileNotFoundError("x"), 2), (RuntimeError("x"), 2), (None, 0)],
)
def test_the_exit_code_tells_a_mistake_from_success(
    raised: Exception | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        if raised is not None:
            raise raised

    assert guarded(work, debug=False) == code
    assert ("error: x" in capsys.readouterr().err) is (code == 2)


def test_an_interrupt_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise KeyboardInterrupt

    assert guarded(work, debug=False) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0, debug=False)


# A whole run -----------------------------------------------------------------------------------


def test_a_dry_run_resolves_everything_loads_no_weights_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.rglob("*"))
    assert run("train", "r.yaml", "--dry-run", "--model_name_or_path", "garbage") == 0
    shown = capsys.readouterr().out
    for part in ("everything resolves", "garbage", "8 train, 8 dev, 8 test", "['calculator']"):
        assert part in shown
    assert "4 a batch = 2 rows x 2" in shown
    assert sorted(here.rglob("*")) == before


def test_the_rows_that_choose_a_checkpoint_do_not_test_it_too(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "dev"):
        shutil.copy(here / "data" / f"{split}.jsonl", tmp_path)
    words = ("train", "r.yaml", "--dry-run", "--dataset", str(tmp_path))
    assert run(*words) == 0
    assert "8 test (those of dev: the data set has no other)" in capsys.readouterr().out
    chosen = ("--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "1")
    assert run(*words, *chosen, "--metric_for_best_model", "exact_match") == 2
    assert "has no test rows, so that the final test would be" in capsys.readouterr().err
    shutil.copy(here / "data" / "dev.jsonl", tmp_path / "test.jsonl")
    assert run(*words, *chosen, "--metric_for_best_model", "exact_match") == 0


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_tested_kept_resumed_evaluated_played_and_compared(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "r.yaml") == 0
    out = here / "out"
    assert "difference (paired)" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} >= {
        *("recipe.yaml", "command.txt", "environment.json", "metrics.jsonl", "trajectories"),
        *("eval.json", "evaluation", "final", "checkpoint-1", "checkpoint-2"),
    }
    assert (out / "command.txt").read_text() == "agentr1 train r.yaml\n"
    assert (out / "recipe.yaml").read_text() == RECIPE
    results = json.loads((out / "eval.json").read_text())
    assert results["before"]["n"] == results["after"]["n"] == 8
    assert results["seconds"] > 0
    assert [record["step"] for record in metrics(out) if "reward" in record] == [1, 2]
    untrained = (out / "evaluation" / "before.jsonl").read_text()

    # Resumed: one more step, the first two and the first test stay.
    assert run("train", "r.yaml", "--resume", "--max_steps", "3") == 0
    assert [record["step"] for record in metrics(out) if "reward" in record] == [1, 2, 3]
    assert (out / "evaluation" / "before.jsonl").read_text() == untrained
    assert (out / "command.txt").read_text() == "agentr1 train r.yaml\n"
    assert (out / "checkpoint-3").is_dir()

    capsys.readouterr()
    assert run("eval", "r.yaml", "--model", "out", "--limit", "3") == 0
    shown = capsys.readouterr().out
    assert "n=3" in shown
    latest = next((here / "runs").rglob("latest"))
    assert json.loads((latest / "eval.json").read_text())["after"]["n"] == 3
    assert run("play", "r.yaml", "--model", "out", "--rows", "2") == 0
    shown = capsys.readouterr().out
    assert "test-r0" in shown
    assert "test-r1" in shown
    assert "stopped: " in shown
    assert run("compare", "out", str(latest)) == 0
    assert "difference (unpaired)" in capsys.readouterr().out


MEASURES = """\
import itertools

_calls = itertools.count()


def length(trajectories, **_):
    return [float(sum(t.turns[0].action_ids) % 17) for t in trajectories]


def falling(trajectories, **_):
    call = next(_calls)
    return [-float(call)] * len(trajectories)
"""
LAST, BEST, EPOCHS = (
    ["--max_steps", "2"],
    [
        *("--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "1"),
        *("--metric_for_best_model", "eval_falling", "--save_total_limit", "2"),
    ],
    ["--max_steps", "-1", "--num_train_epochs", "0.5"],
)


@pytest.mark.parametrize(
    ("options", "tested"),
    [(LAST, "checkpoint-2"), (BEST, "checkpoint-1"), (EPOCHS, "checkpoint-2")],
    ids=["last", "best", "epochs"],
)
def test_a_run_that_was_killed_in_its_final_test_is_tested_and_not_trained_again(
    here: Path, options: list[str], tested: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "measures.py").write_text(MEASURES)
    out = here / f"killed after {tested}{len(options)}"
    measures = ["--rewards", "measures.length", "--metrics", "measures.falling"]
    command = ["train", "r.yaml", *options, *measures, "--output_dir", str(out)]
    assert run(*command) == 0
    kept = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in [*out.glob("checkpoint-*/*"), out / "metrics.jsonl"]
        if path.is_file()
    }
    policy = (out / "final" / "model.safetensors").read_bytes()
    assert policy == (out / tested / "model.safetensors").read_bytes()
    other = ({"checkpoint-1", "checkpoint-2"} - {tested}).pop()
    assert policy != (out / other / "model.safetensors").read_bytes()
    played = episodes(out / "evaluation" / "after.jsonl")
    for name in ("eval.json", "evaluation/after.json"):
        (out / name).unlink()
    (out / "evaluation" / "after.jsonl").write_text("half a line of th")
    (out / "final" / "model.safetensors").write_text("half of the wei")

    capsys.readouterr()
    assert run(*command, "--resume") == 0
    assert json.loads((out / "eval.json").read_text())["after"]["n"] == 8
    assert episodes(out / "evaluation" / "after.jsonl") == played
    assert (out / "final" / "model.safetensors").read_bytes() == policy
    metrics_file = out / "metrics.jsonl"
    assert metrics_file.read_bytes() == kept.pop(metrics_file)[0]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept} == kept
    shown = capsys.readouterr().out
    assert "testing the policy before" not in shown


def episodes(path: Path) -> list[Any]:
    """What the policy said in a test."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [[turn["action_ids"] for turn in line["trajectory"]["turns"]] for line in lines]


@pytest.mark.usefixtures("ctrl_c")
def test_a_run_that_was_tested_is_not_resumed_without_more_steps(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = here / "tested"
    command = ["train", "r.yaml", "--output_dir", str(out), "--max_steps", "1", "--resume"]
    assert run(*command[:-1]) == 0
    results = (out / "eval.json").read_text()
    capsys.readouterr()
    assert run(*command) == 2
    assert "at the end already, max_steps is 1, and was tested" in capsys.readouterr().err
    assert (out / "eval.json").read_text() == results
    # Stopped while it goes on, it has no result that another policy had.
    assert run(*command, "--max_steps", "2", "--rewards", "failing_tools.interrupted_reward") == 130
    assert f"{out / 'final'}, and the same command with --resume" in capsys.readouterr().err
    assert not (out / "eval.json").exists()
    assert run(*command, "--max_steps", "2") == 0
    assert [record["step"] for record in metrics(out) if "reward" in record] == [1, 2]


def test_a_second_run_in_the_same_folder_keeps_nothing_of_the_first(here: Path) -> None:
    out = ["--output_dir", "again", "--max_steps", "1", "--save_strategy", "no"]
    assert run("train", "r.yaml", *out) == 0
    stale = here / "again" / "evaluation" / "before.jsonl"
    stale.write_text("of another policy\n")
    assert run("train", "r.yaml", *out) == 0
    assert stale.read_text().count('"schema"') == 8
    assert [record["step"] for record in metrics(here / "again") if "reward" in record] == [1]
