"""The run folder: every file is there, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentr1 import runs
from agentr1.scoring import Scored
from agentr1.types import Message, StopReason, Trajectory, Turn


def episode(row_id: str = "a", reward: float = 0.5) -> Trajectory:
    turn = Turn(
        action_ids=(1, 2),
        logprobs=(-0.5, -0.25),
        message=Message("assistant", "Yes, \u4f60\u597d."),
        observation_ids=(3,),
        prompt_ids=(7, 8),
        observation=(Message("tool", "found", tool_call_id="call_1", name="lookup"),),
        reward=reward,
        info={"calls": 1.0},
    )
    row = {"id": row_id, "question": "?"}
    return Trajectory(row, (Message("user", "?"),), (turn,), StopReason.MAX_TURNS, 0.25)


def test_run_folders_never_collide_and_latest_names_the_newest(tmp_path: Path) -> None:
    folders = [runs.new_run_folder("task/grpo", tmp_path) for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() for folder in folders)
    latest = tmp_path / "task" / "grpo" / "latest"
    assert latest.resolve() == folders[-1].resolve()
    assert (tmp_path / "task" / "latest").resolve() == folders[-1].resolve()
    assert not (tmp_path / "latest").exists()
    assert sorted(p.name for p in latest.parent.iterdir() if p.name.startswith(".")) == []


def test_latest_survives_a_move_of_the_runs(tmp_path: Path) -> None:
    folder = runs.new_run_folder("task", tmp_path / "runs")
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "task" / "latest").resolve().name == folder.name


def test_the_newest_run_with_a_checkpoint_is_resumed(tmp_path: Path) -> None:
    old, new, newest = (runs.new_run_folder("task", tmp_path) for _ in range(3))
    (old / "checkpoint-9").mkdir()
    (new / "checkpoint-1").mkdir()
    (newest / "_incomplete" / "checkpoint-2").mkdir(parents=True)
    assert runs.newest_resumable("task", tmp_path) == new


def test_nothing_to_resume_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    runs.new_run_folder("task", tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint under .*without --resume"):
        runs.newest_resumable("task", tmp_path)


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file.txt"
    runs.write_text(path, "first")

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.write_text(path, "second")
    assert path.read_text() == "first"


def test_the_header_says_what_was_asked_for_and_what_it_ran_on(tmp_path: Path) -> None:
    runs.write_header(tmp_path, "max_steps: 1\n", ["agentr1", "train", "x", "--prompt", "a b"])
    assert (tmp_path / "recipe.yaml").read_text() == "max_steps: 1\n"
    assert (tmp_path / "command.txt").read_text() == "agentr1 train x --prompt 'a b'\n"
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["python"].startswith("3.")
    assert record["versions"]["trl"].startswith("1.16")
    assert set(record["versions"]) >= {"agentr1", "torch", "transformers"}


def test_a_resumed_run_forgets_the_metrics_of_steps_it_does_again(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        runs.append_metrics(tmp_path, step, {"reward": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed while writing
    runs.drop_metrics_after(tmp_path, 2)
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2}]
    runs.drop_metrics_after(tmp_path / "empty", 2)  # nothing there, nothing to do


def test_a_trajectory_is_kept_token_by_token(tmp_path: Path) -> None:
    path = runs.write_trajectories(tmp_path, 10, 0, [episode(), episode("b")])
    assert path.name == "step_000010.jsonl"
    first, second = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert first["schema"] == runs.SCHEMA_VERSION
    assert first["row"] == {"id": "a", "question": "?"}
    assert second["row"]["id"] == "b"
    assert first["stop_reason"] == "max_turns"
    turn = first["turns"][0]
    assert turn["action_ids"] == [1, 2]
    assert turn["logprobs"] == [-0.5, -0.25]
    assert turn["observation_ids"] == [3]
    assert turn["prompt_ids"] == [7, 8]
    assert turn["reward"] == 0.5
    assert turn["message"]["content"] == "Yes, \u4f60\u597d."
    assert turn["observation"][0]["tool_call_id"] == "call_1"


def test_every_process_writes_a_file_of_its_own(tmp_path: Path) -> None:
    names = [runs.write_trajectories(tmp_path, 3, rank, [episode()]).name for rank in (0, 1)]
    assert names == ["step_000003.jsonl", "step_000003.rank1.jsonl"]


def test_scores_come_back_as_they_were_written(tmp_path: Path) -> None:
    scored = [Scored(i, {"f1": 0.5, "exact": 1.0}, episode(i)) for i in ("a", "b")]
    runs.write_scores(tmp_path / "evaluation" / "after.jsonl", scored)
    path = tmp_path / "evaluation" / "after.jsonl"
    assert runs.read_scores(path, "f1") == {"a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match=r"no metric 'em', it has \['exact', 'f1'\]"):
        runs.read_scores(path, "em")
    with pytest.raises(FileNotFoundError, match="is .* a finished run"):
        runs.read_scores(tmp_path / "nowhere" / "evaluation" / "after.jsonl", "f1")


def test_whole_episodes_come_back_and_a_line_that_was_cut_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "evaluation" / "after.jsonl"
    scored = [Scored(i, {"f1": 0.5}, episode(i), wall_seconds=2.0) for i in ("a", "b", "c")]
    runs.append_scores(path, scored[:1])
    runs.append_scores(path, scored[1:])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"schema": 1, "id": "d", "val')  # killed while writing
    back = list(runs.stream_scores(path))
    assert back == scored
    assert [s.wall_seconds for s in back] == [2.0] * 3
    assert runs.read_scores(path, "f1") == {"a": 0.5, "b": 0.5, "c": 0.5}
