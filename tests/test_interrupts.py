"""A run that is asked to stop: Ctrl-C once and twice, SIGTERM, on one process and on two."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from agentr1.cli import main
from agentr1.interrupts import Interrupts
from agentr1.types import Message, StepResult
from processes import Job, job, launcher
from trainers import ROWS, PlannedEnv, make_trainer

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
COMPLETE = {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Python's own handlers, wherever the tests were started from, and no other afterwards."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model()


class Asking(PlannedEnv):
    """Somebody presses Ctrl-C, or a scheduler asks, while this episode is under way."""

    trainer: Any
    at: tuple[int, int] | None = None
    """Step in which it happens, and the signal."""
    afterwards: list[Any]
    """What the two signals would do after the first one."""

    async def step(self, message: Message) -> StepResult:
        if self.at is not None and Asking.trainer.state.global_step == self.at[0]:
            number, Asking.at = self.at[1], None
            os.kill(os.getpid(), number)
            handlers = (signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM))
            Asking.afterwards = list(handlers)
        return await super().step(message)


def length_reward(trajectories: Sequence[Any], **_: object) -> list[float]:
    """Something the policy's draws decide."""
    return [float(sum(t.turns[0].action_ids) % 17) for t in trajectories]


@pytest.fixture
def build(tmp_path: Path, model: Any, tokenizer: Any) -> Callable[..., Any]:
    def build(at: tuple[int, int] | None = None, **changes: Any) -> Any:
        Asking.at = at
        plans = iter([[0.5], [0.0, 0.0]] * 500)
        settings = SAVING | changes.pop("settings", {})
        given = {"env_factory": lambda: Asking(plans), "rewards": length_reward, **changes}
        trainer = make_trainer(tmp_path, model, tokenizer, settings=settings, **given)
        Asking.trainer = trainer
        return trainer

    return build


def fit(trainer: Any, checkpoint: Path | None = None) -> Interrupts:
    """As `agentr1 train` does it."""
    with Interrupts() as interrupts:
        trainer.add_callback(interrupts)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return interrupts


def checkpoints(folder: Path) -> list[str]:
    found = sorted(folder.glob("checkpoint-*"))
    for path in found:
        assert {file.name for file in path.iterdir()} >= COMPLETE
    return [path.name for path in found]


def assert_same_weights(ours: Any, theirs: Any) -> None:
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(weight, other), name


# One signal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_rollout_stops_after_the_step_and_the_run_can_go_on(
    build: Callable[..., Any], tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    stopped = build((1, number))
    with pytest.raises(KeyboardInterrupt) as said:
        fit(stopped)
    assert stopped.state.global_step == 2
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    for part in ("step 2 of 4", "checkpoint-2", str(tmp_path), "--resume"):
        assert part in str(said.value)
    assert "finishing this step and saving; Ctrl-C again" in capfd.readouterr().err

    resumed = build()
    fit(resumed, tmp_path / "checkpoint-2")
    whole = build()
    fit(whole)
    assert_same_weights(resumed.model, whole.model)
    logged = [
        [(r["step"], r["reward"], r["loss"]) for r in t.state.log_history if "reward" in r]
        for t in (resumed, whole)
    ]
    assert logged[0] == logged[1]


def test_a_second_ctrl_c_is_left_to_the_kernel_and_a_second_sigterm_says_nothing_new(
    build: Callable[..., Any],
) -> None:
    for number, expected in (
        (signal.SIGINT, [signal.SIG_DFL, signal.SIG_DFL]),
        (signal.SIGTERM, [signal.SIG_DFL, signal.SIG_IGN]),
    ):
        with pytest.raises(KeyboardInterrupt):
            fit(build((0, number)))
        assert Asking.afterwards == expected
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class Pressing(TrainerCallback):
    """Ctrl-C at some other moment."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self.press)

    def press(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("event", "save_steps"), [("on_evaluate", 4), ("on_save", 2)])
def test_a_signal_after_a_step_does_not_cost_another_step(
    build: Callable[..., Any], tmp_path: Path, event: str, save_steps: int
) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": save_steps}
    rows = Dataset.from_list([dict(row) for row in ROWS[:2]])
    trainer = build(settings=settings, eval_dataset=rows)
    trainer.add_callback(Pressing(event, 2))
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 4"):
        fit(trainer)
    assert checkpoints(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("strategy", ["no", "best"])
def test_a_stop_saves_whatever_the_save_strategy_says(
    build: Callable[..., Any], tmp_path: Path, strategy: str
) -> None:
    def worse(trajectories: Sequence[Any], **_: object) -> list[float]:
        return [-float(Asking.trainer.state.global_step)] * len(trajectories)

    settings = {"save_strategy": strategy, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"metric_for_best_model": "eval_worse"}
    rows = Dataset.from_list([dict(row) for row in ROWS[:2]])
    trainer = build(settings=settings, eval_dataset=rows, metrics={"worse": worse})
    trainer.add_callback(Pressing("on_step_begin", 1))
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 4"):
        fit(trainer)
    best = ["checkpoint-1"] if strategy == "best" else []
    assert checkpoints(tmp_path) == [*best, "checkpoint-2"]


def test_a_batch_that_was_begun_is_finished_so_that_the_resumed_run_draws_no_other(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"num_iterations": 2}
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 4"):
        fit(build((0, signal.SIGINT), settings=settings))
    resumed = build(settings=settings)
    fit(resumed, tmp_path / "checkpoint-2")
    whole = build(settings=settings)
    fit(whole)
    assert_same_weights(resumed.model, whole.model)


def test_the_last_step_ends_the_training_as_ever(build: Callable[..., Any], tmp_path: Path) -> None:
    trainer = build((3, signal.SIGINT))
    interrupts = fit(trainer)
    assert interrupts.stopping
    assert trainer.state.global_step == 4
    assert checkpoints(tmp_path) == ["checkpoint-4"]


def test_an_ignored_signal_stays_ignored(build: Callable[..., Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = build((1, signal.SIGINT))
    assert not fit(trainer).stopping
    assert trainer.state.global_step == 4
    assert Asking.afterwards[0] is signal.SIG_IGN


def test_a_training_in_another_thread_leaves_the_signals_alone(build: Callable[..., Any]) -> None:
    trainer, failed = build(), []

    def work() -> None:
        try:
            fit(trainer)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == []
    assert trainer.state.global_step == 4


def test_the_handlers_are_given_back_after_an_exception(build: Callable[..., Any]) -> None:
    def broken(prompts: Sequence[Any], **_: object) -> list[float]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(build(rewards=broken))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_kill_while_old_checkpoints_are_deleted_leaves_none_that_is_not_whole(
    build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Any, *_: Any, **__: Any) -> None:
        for file in Path(folder).rglob("optimizer.pt"):
            file.unlink()
            raise KeyboardInterrupt  # half of the folder is gone

    trainer = build(settings={"save_steps": 1, "save_total_limit": 2})
    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert list(tmp_path.glob("_incomplete/old-checkpoint-1"))
    monkeypatch.undo()
    fit(build(settings={"save_steps": 1, "save_total_limit": 2}), tmp_path / "checkpoint-3")
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    assert not (tmp_path / "_incomplete").exists()


# Real processes --------------------------------------------------------------------------------

SMALL = (
    *("--per_device_train_batch_size", "8", "--num_generations", "4", "--max_turn_tokens", "32"),
    *("--test_limit", "6", "--dev_limit", "6", "--eval_strategy", "no", "--save_steps", "10"),
    *("--load_best_model_at_end", "false", "--max_steps", "3", "--max_turns", "2"),
)
# Every call hangs, so nearly every turn is faulted: that is not what is tested here.
HANGING = ("--tools", "failing_tools.hanging", "--max_fault_share", "1")


def run(folder: Path, *options: str, launched: str | None = None) -> list[str]:
    """The command, behind a launcher with one of recipes/accelerate if it is named."""
    module = [*launcher(launched), "-m", "agentr1.train"] if launched else []
    verb = module or [sys.executable, "-m", "agentr1", "train"]
    return [*verb, "quickstart", "--output_dir", str(folder), *SMALL, *options]


def steps_logged(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]


def finish(folder: Path, log: Path, *options: str, launched: str | None = None) -> dict[str, Any]:
    """Run to the end and return the final weights."""
    with job(run(folder, *options, launched=launched), log) as running:
        assert running.wait(100) == 0, running.output[-4000:]
    assert steps_logged(folder) == [1, 2, 3]
    return load_file(folder / "final" / "model.safetensors")


def assert_equal_weights(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def ranks(launch: Job) -> dict[str, psutil.Process]:
    """The launcher's workers by rank."""
    workers = psutil.Process(launch.process.pid).children()
    return {w.environ()["RANK"]: w for w in workers if "RANK" in w.environ()}


@pytest.mark.parametrize("saved", [True, False])
def test_a_stop_in_the_last_step_keeps_the_policy_and_skips_its_test(
    tmp_path: Path, saved: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = ("--rewards", "failing_tools.interrupted_reward", "--max_steps", "1")
    saving = () if saved else ("--save_strategy", "no")
    assert main(run(folder, *options, *saving)[3:]) == 130
    shown = capsys.readouterr().err
    way = "the same command with --resume" if saved else f"agentr1 eval RECIPE --model {folder}"
    assert way in shown
    assert (folder / "final" / "model.safetensors").is_file()
    assert {p.stem for p in (folder / "evaluation").iterdir()} == {"before"}
    if saved:
        assert main(run(folder, *options, "--resume")[3:]) == 0
        assert json.loads((folder / "eval.json").read_text("utf-8"))["after"]["n"] == 6
        assert steps_logged(folder) == [1]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_full_disk_is_told_and_costs_no_earlier_checkpoint(tmp_path: Path) -> None:
    """A disk of its own, on which the first checkpoint fits and not the second."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=20m tmpfs {disk}"
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*alone, mount], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    train = shlex.join(run(disk / "run", "--save_steps", "1"))
    shown = f"ls {disk}/run {disk}/run/checkpoint-1; cat {disk}/run/checkpoint-1/trainer_state.json"
    done = subprocess.run(
        [*alone, f"{mount}; {train}; echo code $?; {shown}"], capture_output=True, text=True
    )
    assert "code 2" in done.stdout
    assert f"error: no space left for {disk}/run/checkpoint-2; checkpoints" in done.stderr
    assert "Traceback" not in done.stderr
    assert "checkpoint-1" in done.stdout
    assert "_incomplete" not in done.stdout
    assert '"global_step": 1' in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ctrl_c_once_and_twice_with_tools_that_hang(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    slowly = (*HANGING, "--tool_timeout", "1")
    with job(run(folder, *slowly), tmp_path / "once") as running:
        running.wait_for(lambda: steps_logged(folder))
        running.process.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
        assert "finishing this step" in running.output
        assert re.search(r"stopped after step 2 of 3.*--resume", running.output)
        assert "KeyboardInterrupt" not in running.output
    assert checkpoints(folder) == ["checkpoint-2"]
    assert not (folder / "final").exists()
    assert not (folder / "evaluation" / "after.jsonl").exists()

    # Resumed with tools that hang for ever, and stopped twice: at once, and nothing is lost.
    for_ever = (*HANGING, "--tool_timeout", "1000", "--resume")
    with job(run(folder, *for_ever), tmp_path / "twice") as running:
        running.wait_for(lambda: "a call hangs" in running.output)
        running.process.send_signal(signal.SIGINT)
        running.wait_for(lambda: "finishing this step" in running.output)
        time.sleep(1)  # it goes on waiting
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGINT)
        assert running.wait(5) == -signal.SIGINT  # a shell shows 130
        assert "KeyboardInterrupt" not in running.output
    assert checkpoints(folder) == ["checkpoint-2"]

    resumed = finish(folder, tmp_path / "resumed", *slowly, "--resume")
    whole = finish(tmp_path / "whole", tmp_path / "log", *slowly)
    assert_equal_weights(resumed, whole)


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_stops_at_once(tmp_path: Path) -> None:
    for_ever = (*HANGING, "--tool_timeout", "1000")
    with job(run(tmp_path / "run", *for_ever), tmp_path / "log") as running:
        running.wait_for(lambda: "a call hangs" in running.output)
        running.process.send_signal(signal.SIGINT)
        assert running.wait(10) == 130
        assert running.output.endswith("interrupted\n")
        assert "KeyboardInterrupt" not in running.output
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize("configuration", [None, "cpu_zero2"])
def test_a_run_that_is_ended_in_its_final_test_is_tested_and_not_trained_again(
    tmp_path: Path, configuration: str | None
) -> None:
    folder = tmp_path / "run"
    adapters = ("--use_peft", "true", "--lora_r", "4") if configuration else ()
    slowly = (*HANGING, *adapters, "--tool_timeout", "1")
    with job(run(folder, *slowly, launched=configuration), tmp_path / "log") as running:
        running.wait_for(lambda: "the policy after" in running.output)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(30) != 0
    assert not (folder / "eval.json").exists()
    (checkpoint,) = folder.glob("checkpoint-*")
    kept = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}
    metrics = (folder / "metrics.jsonl").read_bytes()
    (weights,) = (folder / "final").glob("*model.safetensors")
    policy = load_file(weights)

    with job(run(folder, *slowly, "--resume", launched=configuration), tmp_path / "2") as resumed:
        assert resumed.wait(100) == 0, resumed.output[-4000:]
    assert json.loads((folder / "eval.json").read_text("utf-8"))["after"]["n"] == 6
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")} == kept
    assert_equal_weights(load_file(weights), policy)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_two_processes_stop_after_the_same_step_when_one_is_asked(tmp_path: Path) -> None:
    """Once one rank alone is asked, once the launcher, as a scheduler does."""
    folder = tmp_path / "run"
    with job(run(folder, launched="cpu_ddp"), tmp_path / "one") as launch:
        launch.wait_for(lambda: steps_logged(folder))
        ranks(launch)["1"].send_signal(signal.SIGINT)
        assert launch.wait(60) != 0
        (step,) = re.findall(r"stopped after step (\d) of 3", launch.output)
    assert checkpoints(folder) == [f"checkpoint-{step}"]
    states = {p.name for p in (folder / f"checkpoint-{step}").glob("rng_state_*.pth")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}

    slowly = (*HANGING, "--tool_timeout", "1", "--resume", "--max_steps", "100")
    grace = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}
    with job(run(folder, *slowly, launched="cpu_ddp"), tmp_path / "all", **grace) as launch:
        launch.wait_for(lambda: "a call hangs" in launch.output)
        workers = ranks(launch)
        launch.process.send_signal(signal.SIGTERM)
        assert launch.wait(60) != 0
        assert "for which the launcher waits 60 s" in launch.output
        assert re.search(r"stopped after step \d+ of 100", launch.output)
        assert not any(worker.is_running() for worker in workers.values())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_a_launch_that_was_stopped_and_resumed_equals_one_that_was_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with job(run(folder, launched="cpu_ddp"), tmp_path / "one") as launch:
        launch.wait_for(lambda: steps_logged(folder))
        launch.process.send_signal(signal.SIGINT)
        assert launch.wait(60) != 0
    resumed = finish(folder, tmp_path / "resumed", "--resume", launched="cpu_ddp")
    whole = finish(tmp_path / "whole", tmp_path / "log", launched="cpu_ddp")
    assert_equal_weights(resumed, whole)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("presses", "grace"), [(2, "100"), (1, "3")])
def test_ctrl_c_twice_or_the_launchers_grace_ends_a_launch_and_all_its_processes(
    tmp_path: Path, presses: int, grace: str
) -> None:
    options = ("--tools", "failing_tools.hanging_later", "--tool_timeout", "1000")
    command = run(tmp_path / "run", *options, "--test_limit", "1", launched="cpu_ddp")
    with job(command, tmp_path / "log", TORCH_ELASTIC_SHUTDOWN_TIMEOUT=grace) as launch:
        launch.wait_for(lambda: launch.output.count("a call hangs") > 1)
        workers = ranks(launch)
        assert sorted(workers) == ["0", "1"]
        launch.process.send_signal(signal.SIGINT)
        if presses > 1:
            launch.wait_for(lambda: "finishing this step" in launch.output)
            launch.process.send_signal(signal.SIGINT)
        assert launch.wait(10) != 0
        assert not any(worker.is_running() for worker in workers.values())
    assert checkpoints(tmp_path / "run") == []
