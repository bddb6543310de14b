"""Training while one tool call in twenty fails, and stopping when most of them do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import agentr1.train
from agentr1.evaluate import evaluate
from agentr1.runs import read_scores
from agentr1.statistics import Interval, mean_ci
from agentr1.trainer import AgentTrainer
from processes import job, launcher

SMALL = (
    *("--max_steps", "20", "--per_device_train_batch_size", "48", "--test_limit", "2"),
    *("--eval_strategy", "no", "--load_best_model_at_end", "false", "--save_strategy", "no"),
    *("--trajectory_steps", "0"),
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class Counting(AgentTrainer):
    """Checks what is trained on in every batch, and counts the calls that failed."""

    calls = faults = 0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"] * output["tool_mask"]
        for i, episode in enumerate(self._episodes):
            trained = []
            for turn in episode.turns:
                trained += [int(turn.fault is None)] * len(turn.action_ids)
                trained += [0] * len(turn.observation_ids)
                Counting.calls += int(turn.info.get("calls", 0))
                Counting.faults += int(turn.info.get("faults", 0))
            assert mask[i, : len(trained)].tolist() == trained
            assert not mask[i, len(trained) :].any()
        return output


def exact_match(folder: Path) -> Interval:
    return mean_ci(list(read_scores(folder / "evaluation" / "after.jsonl", "exact_match").values()))


def test_five_percent_of_failing_calls_cost_no_more_than_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agentr1.train, "AgentTrainer", Counting)
    monkeypatch.chdir(tmp_path)  # for what the evaluations below leave behind
    agentr1.train.train("quickstart", [*SMALL, "--output_dir", "whole"])
    assert Counting.faults == 0 < Counting.calls
    Counting.calls = 0
    faulty = ("--tools", "failing_tools.now_and_then", "--output_dir", "faulty")
    agentr1.train.train("quickstart", [*SMALL, *faulty])
    assert 0.03 < Counting.faults / Counting.calls < 0.07
    logged = (tmp_path / "faulty" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert any(json.loads(line).get("rollout/faults", 0) > 0 for line in logged)

    # All three policies are tested with a search that works.
    before, whole, with_faults = (
        exact_match(evaluate("quickstart", ["--test_limit", "150"], policy))
        for policy in (None, "whole", "faulty")
    )
    print(f"{before=}, {whole=}, {with_faults=}, {Counting.faults} of {Counting.calls} calls")
    assert with_faults.low <= whole.high
    assert whole.low <= with_faults.high
    assert with_faults.mean > before.high  # it did learn


@pytest.mark.distributed
def test_too_many_faults_stop_the_run_on_both_ranks_with_the_share_and_the_reason(
    tmp_path: Path,
) -> None:
    verb = [*launcher("cpu_ddp"), "-m", "agentr1.train", "quickstart"]
    options = ("--tools", "failing_tools.mostly", "--output_dir", str(tmp_path / "run"))
    small = (*SMALL, "--per_device_train_batch_size", "8")
    limited = ("--max_fault_share", "0.25")
    with job([*verb, *options, *small, *limited], tmp_path / "log") as launch:
        assert launch.wait(100) != 0
    errors = re.findall(
        r"error: (\d+) of (\d+) turns met an infrastructure fault, more than max_fault_share=0.25: "
        r"(.+?); check the tools' servers",
        launch.output,
    )
    assert len(errors) == 2, launch.output[-4000:]
    assert errors[0][:2] == errors[1][:2]
    assert "the search server closed the connection" in launch.output
    assert not list((tmp_path / "run").glob("checkpoint-*"))
