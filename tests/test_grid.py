"""Many runs: skipped when done, gone on with when not, some at a time, whatever ends them."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from agentr1.cells import Run, State, progress_line, state_of
from agentr1.grid import carry_out, check_options, run_grid
from agentr1.grid_board import Board, Job
from grids import RECIPE, evaluation_of, fake_program, make_run
from processes import Job as Process
from processes import job


@pytest.fixture
def program(tmp_path: Path) -> tuple[str, ...]:
    return fake_program(tmp_path)


def starts(run: Run) -> list[str]:
    """The commands that were started for a run."""
    return [line for line in run.log.read_text().splitlines() if line.startswith("$ ")]


def test_runs_are_done_once(
    tmp_path: Path, program: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path, f"a/seed{i}") for i in (1, 2)]
    assert [state_of(run) for run in runs] == [State.NEW, State.NEW]
    assert run_grid(runs, program=program) == []
    assert [state_of(run) for run in runs] == [State.DONE, State.DONE]
    assert evaluation_of(runs[0])["ended"] <= evaluation_of(runs[1])["started"]
    assert "2 of 2 done" in capsys.readouterr().out
    assert run_grid(runs, program=program) == []
    assert [len(starts(run)) for run in runs] == [1, 1]
    shown = capsys.readouterr().out
    assert "2 of 2 runs were done before" in shown
    assert "started" not in shown


def test_a_failure_is_shown_and_the_others_go_on(
    tmp_path: Path, program: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path, "bad", "--do", "fail"), make_run(tmp_path, "gone", "--do", "vanish")]
    good = make_run(tmp_path, "good")
    assert run_grid([*runs, good], program=program) == runs
    assert [state_of(run) for run in (*runs, good)] == [State.BEGUN, State.BEGUN, State.DONE]
    shown = capsys.readouterr().out
    assert f"failed  bad: exit code 3; {runs[0].log} ends with" in shown
    assert "no such tool" in shown  # behind a carriage return, as a progress bar leaves it
    assert "line 39" in shown
    assert "line 1\n" not in shown  # the tail alone
    assert "failed  gone: exit code 0, but it left no evaluation" in shown
    run_grid([*runs, good], program=program)
    assert [len(starts(run)) for run in (*runs, good)] == [2, 2, 1]


def test_so_many_jobs_run_at_a_time(tmp_path: Path, program: Sequence[str]) -> None:
    runs = [make_run(tmp_path, f"seed{i}", "--do", "nap") for i in range(5)]
    assert run_grid(runs, jobs=2, program=program) == []
    spans = [(evaluation_of(run)["started"], evaluation_of(run)["ended"]) for run in runs]
    at_once = [sum(a <= start < b for a, b in spans) for start, _ in spans]
    assert max(at_once) == 2


def test_runs_at_the_same_time_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "threads.py"
    script.write_text("import os; print('threads', os.environ.get('OMP_NUM_THREADS'))")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for jobs, said in (
        (1, "None"),
        (os.cpu_count() or 1, "1" if (os.cpu_count() or 1) > 1 else "None"),
    ):
        run = make_run(tmp_path, f"jobs{jobs}")
        run_grid([run], jobs=jobs, program=(sys.executable, str(script)))
        assert f"threads {said}" in run.log.read_text()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # a user's own setting wins
    run = make_run(tmp_path, "own")
    run_grid([run], jobs=2, program=(sys.executable, str(script)))
    assert "threads 7" in run.log.read_text()


# What a run left -------------------------------------------------------------------------------


def begun(run: Run, step: int | None) -> None:
    """A run that was killed, with or without a checkpoint."""
    run_grid([run], program=(sys.executable, "-c", "import sys; sys.exit(1)"))
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "recipe.yaml").write_text(RECIPE)
    (run.folder / "command.txt").write_text("agentr1 " + " ".join(run.arguments) + "\n")
    (run.folder / "half").write_text("")
    if step is not None:
        for at in {2, step}:
            (run.folder / f"checkpoint-{at}").mkdir()
            state = f'{{"global_step": {at}, "max_steps": 4}}'
            (run.folder / f"checkpoint-{at}" / "trainer_state.json").write_text(state)


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_goes_on_from_its_checkpoint(
    tmp_path: Path, program: Sequence[str], step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the end too, where the final test alone is missing."""
    run = make_run(tmp_path, "a")
    begun(run, step)
    assert state_of(run) is State.BEGUN
    assert run_grid([run], program=program) == []
    assert evaluation_of(run)["resumed"]
    assert (run.folder / "half").exists()
    assert f"started a, from step {step}" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_starts_afresh(tmp_path: Path, program: Sequence[str]) -> None:
    run = make_run(tmp_path, "a")
    begun(run, step=None)
    assert run_grid([run], program=program) == []
    assert not evaluation_of(run)["resumed"]
    assert not (run.folder / "half").exists()


def test_a_folder_of_another_run_is_neither_used_nor_deleted(
    tmp_path: Path, program: Sequence[str]
) -> None:
    run = make_run(tmp_path, "a", "--lr", "1")
    run_grid([run], program=program)
    others = [
        make_run(tmp_path, "a", "--lr", "2"),
        Run("a", run.folder, run.recipe, RECIPE.replace("4", "5"), run.overrides),
    ]
    for other in others:
        assert state_of(other) is State.FOREIGN
        with pytest.raises(ValueError, match=r"another command or recipe: .*/out/a; delete them"):
            run_grid([other], program=program)
    commented = Run("a", run.folder, run.recipe, "# Measured: .5\n" + RECIPE, run.overrides)
    assert state_of(commented) is State.DONE
    stranger = make_run(tmp_path, "mine")
    stranger.folder.mkdir()
    (stranger.folder / "thesis.tex").write_text("")
    assert state_of(stranger) is State.FOREIGN


TRESPASSER = """\
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1]).with_name("b")
folder.mkdir()
(folder / "recipe.yaml").write_text("algorithm: rloo")
(folder / "command.txt").write_text("agentr1 train rloo")
"""


def test_what_became_of_a_folder_is_seen_before_it_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b")]
    (tmp_path / "trespasser.py").write_text(TRESPASSER)
    program = (sys.executable, str(tmp_path / "trespasser.py"))
    assert run_grid(runs, program=program) == runs
    assert (runs[1].folder / "recipe.yaml").read_text() == "algorithm: rloo"
    assert starts(runs[1]) == []
    shown = capsys.readouterr().out
    assert f"failed  b: {runs[1].folder} now holds a run of another command" in shown


# Signals ---------------------------------------------------------------------------------------

DRIVER = """\
import os, sys
os.setsid()  # a terminal's Ctrl-C reaches the whole group of processes
from pathlib import Path
from agentr1.grid import run_grid
from grids import fake_program, make_run
folder = Path(sys.argv[1])
runs = [make_run(folder, f"seed{i}", "--do", sys.argv[2]) for i in (1, 2, 3)]
try:
    run_grid(runs, jobs=2, program=fake_program(folder))
except KeyboardInterrupt as stop:
    print(stop)
    sys.exit(130)
"""


@pytest.fixture
def orphans() -> Iterator[list[psutil.Process]]:
    """Processes that must not outlive the test."""
    found: list[psutil.Process] = []
    yield found
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def under_way(grid: Process, runs: Sequence[Run], orphans: list[psutil.Process]) -> None:
    """Wait until two runs are at their first step."""
    grid.wait_for(lambda: all(run.step == 1 for run in runs[:2]))
    orphans += psutil.Process(grid.process.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_lets_the_runs_save_and_the_same_command_goes_on(
    tmp_path: Path, program: Sequence[str], orphans: list[psutil.Process], number: int
) -> None:
    runs = [make_run(tmp_path, f"seed{i}", "--do", "wait") for i in (1, 2, 3)]
    with job([sys.executable, "-c", DRIVER, str(tmp_path), "wait"], tmp_path / "log") as grid:
        under_way(grid, runs, orphans)
        assert progress_line(runs) == (
            "3 runs: 1 not started, 2 running; now seed1 (step 1 of 4), seed2 (step 1 of 4)"
        )
        if number == signal.SIGINT:
            os.killpg(grid.process.pid, number)
        else:
            grid.process.send_signal(number)
        assert grid.wait(60) == 130
    assert "stopping: 2 finish their step and save" in grid.output
    assert "stopped seed1 at step 1" in grid.output
    assert "stopped with 0 of 3 runs done; the same command goes on from there" in grid.output
    assert "saved" in runs[0].log.read_text()
    assert [state_of(run) for run in runs] == [State.BEGUN, State.BEGUN, State.NEW]
    assert run_grid(runs[:2], program=program) == []
    assert [evaluation_of(run)["resumed"] for run in runs[:2]] == [True, True]


def test_a_run_that_was_ended_in_its_final_test_keeps_its_training(
    tmp_path: Path, program: Sequence[str], orphans: list[psutil.Process]
) -> None:
    runs = [make_run(tmp_path, f"seed{i}", "--do", "late") for i in (1, 2, 3)]
    with job([sys.executable, "-c", DRIVER, str(tmp_path), "late"], tmp_path / "log") as grid:
        under_way(grid, runs, orphans)
        grid.process.send_signal(signal.SIGTERM)
        assert grid.wait(60) == 130
    assert run_grid(runs[:2], program=program) == []
    assert [evaluation_of(run)["resumed"] for run in runs[:2]] == [True, True]


def test_an_exception_leaves_no_run_behind(
    tmp_path: Path, program: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run(tmp_path, f"seed{i}", "--do", "wait") for i in (1, 2)]

    def show(self: Board, running: Sequence[Job], waiting: int) -> None:
        if [job.run.step for job in running] == [1, 1]:
            raise ZeroDivisionError

    monkeypatch.setattr(Board, "show", show)
    with pytest.raises(ZeroDivisionError):
        run_grid(runs, jobs=2, program=program)
    end = time.monotonic() + 60
    while any(state_of(run) is State.RUNNING for run in runs):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert [state_of(run) for run in runs] == [State.BEGUN, State.BEGUN]
    assert all("saved" in run.log.read_text() for run in runs)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, orphans: list[psutil.Process]) -> None:
    runs = [make_run(tmp_path, f"seed{i}", "--do", "hang") for i in (1, 2)]
    with job([sys.executable, "-c", DRIVER, str(tmp_path), "hang"], tmp_path / "log") as grid:
        under_way(grid, runs, orphans)
        grid.process.send_signal(signal.SIGINT)
        grid.wait_for(lambda: "stopping" in grid.output)
        time.sleep(0.5)
        assert grid.process.poll() is None  # the runs do not listen
        grid.process.send_signal(signal.SIGTERM)  # a scheduler's repetition ends nothing
        time.sleep(0.5)
        assert grid.process.poll() is None
        grid.process.send_signal(signal.SIGINT)
        assert grid.wait(60) == 130
    assert not any(process.is_running() for process in orphans)


# Two grids at once -----------------------------------------------------------------------------


def test_a_run_that_outlived_its_grid_is_waited_for(
    tmp_path: Path,
    program: Sequence[str],
    orphans: list[psutil.Process],
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [make_run(tmp_path, f"seed{i}", "--do", "hang") for i in (1, 2)]
    with job([sys.executable, "-c", DRIVER, str(tmp_path), "hang"], tmp_path / "log") as grid:
        under_way(grid, runs, orphans)
        grid.process.kill()
        grid.process.wait()
    assert state_of(runs[0]) is State.RUNNING
    ends = threading.Timer(3, lambda: [process.kill() for process in orphans])
    ends.start()
    run_grid(runs[:1], program=(sys.executable, "-c", ""))  # which goes wrong, but not before
    shown = capsys.readouterr().out
    assert "waiting: other processes are at seed1\nstarted seed1" in shown
    assert len(starts(runs[0])) == 2


def test_two_grids_with_the_same_runs_share_them_out(
    tmp_path: Path, program: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path, f"seed{i}", "--do", "nap2") for i in (1, 2, 3)]
    with job([sys.executable, "-c", DRIVER, str(tmp_path), "nap2"], tmp_path / "log") as grid:
        grid.wait_for(lambda: state_of(runs[0]) is State.RUNNING)
        assert run_grid(runs, program=program) == []
        assert grid.wait(60) == 0
    assert [state_of(run) for run in runs] == [State.DONE] * 3
    assert [len(starts(run)) for run in runs] == [1, 1, 1]
    for shown in (capsys.readouterr().out, grid.output):
        assert "started seed" in shown
        assert ", by another process" in shown
        assert "3 of 3 done" in shown


def test_a_second_grid_with_other_overrides_is_refused(
    tmp_path: Path, program: Sequence[str]
) -> None:
    runs = [make_run(tmp_path, f"seed{i}", "--do", "nap2") for i in (1, 2, 3)]
    others = [make_run(tmp_path, run.name, "--lr", "2") for run in runs]
    with job([sys.executable, "-c", DRIVER, str(tmp_path), "nap2"], tmp_path / "log") as grid:
        grid.wait_for(lambda: state_of(runs[0]) is State.RUNNING and runs[0].folder.exists())
        with pytest.raises(ValueError, match=r"another command or recipe: .*/out/seed1"):
            run_grid(others, program=program)
        assert grid.wait(60) == 0
    assert [state_of(run) for run in runs] == [State.DONE] * 3
    assert [len(starts(run)) for run in runs] == [1, 1, 1]


# The command line and the estimate -------------------------------------------------------------


def arguments(tmp_path: Path, **changes: object) -> argparse.Namespace:
    values = {"task": "t", "seeds": [1, 2], "jobs": 1, "out": tmp_path / "out"}
    return argparse.Namespace(**values, **{"report": False, "background": False} | changes)


def test_failed_runs_are_an_error_after_the_report(tmp_path: Path, program: Sequence[str]) -> None:
    shown: list[str] = []
    runs = [make_run(tmp_path, "bad", "--do", "fail"), make_run(tmp_path, "good")]
    with pytest.raises(RuntimeError, match="1 of 2 runs failed: bad; the same command tries"):
        carry_out(arguments(tmp_path), [], runs, lambda: shown.append("report"), program)
    assert shown == ["report"]


def test_a_report_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    runs = [make_run(tmp_path, "a")]
    args = arguments(tmp_path, report=True)
    carry_out(args, ["ablate"], runs, lambda: shown.append("report"))
    assert shown == ["report"]
    assert capsys.readouterr().out == "1 runs: 1 not started\n"
    assert not runs[0].log.exists()


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({"task": "quickstart/ppo"}, [], "a task is a folder of recipes"),
        ({"seeds": [1, 1]}, [], "--seeds must differ"),
        ({"jobs": 0}, [], "--jobs be at least 1"),
        ({}, ["--seed", "4"], r"\['--seed'\]; use --seeds"),
        ({}, ["--output_dir=x"], "use --seeds and --out"),
        ({}, ["--output-dir", "x"], r"\['--output-dir'\]; use --seeds"),
    ],
)
def test_options_that_make_no_grid_are_refused(
    tmp_path: Path, changes: dict[str, object], overrides: list[str], said: str
) -> None:
    args = arguments(tmp_path)
    vars(args).update(changes)
    with pytest.raises(ValueError, match=said):
        check_options(args, overrides)


def test_the_time_left_is_that_of_what_is_missing(tmp_path: Path) -> None:
    """Half of a run is done in 50 s: its other half and three more, two at a time, take 175 s."""
    run = make_run(tmp_path, "a")
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text('{"step": 2}\n')
    board = Board(total=4, missing=4, jobs=2)
    going: list[Job] = [Job(run, None, time.monotonic() - 50, 0)]  # type: ignore[arg-type]
    assert board._estimate(going, waiting=3) == pytest.approx(175, abs=1)
    going[0].first_step = 2  # resumed there: nothing is known yet
    assert board._estimate(going, waiting=3) is None


def test_a_grid_in_the_background_outlives_its_command(
    tmp_path: Path, program: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "a")
    args = arguments(tmp_path, background=True)
    argv = [*run.arguments, "--background"]
    carry_out(args, argv, [run], lambda: None, program)
    shown = capsys.readouterr().out
    assert f"prints to {args.out / 'log.txt'}" in shown
    assert "--output_dir" in shown.splitlines()[1]
    assert shown.endswith("--report\n")
    assert "--background" not in shown
    end = time.monotonic() + 60
    while not (run.folder / "eval.json").exists():
        assert time.monotonic() < end, (args.out / "log.txt").read_text()
        time.sleep(0.05)
