"""How a batch is cut up does not change its gradient: accumulation, order, processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gradient_worker import GROUPS, SIZE, WAYS, step
from processes import ROOT, job, launcher

EPISODES = GROUPS * SIZE

Parts = dict[str, torch.Tensor]
"""What a step has added to the weights of the policy and of each part of a critic."""


@pytest.fixture(scope="module")
def whole(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Parts]:
    """The step of one process that takes the batch in one piece."""
    found: dict[str, Parts] = {}

    def whole(name: str) -> Parts:
        if name not in found:
            folder = tmp_path_factory.mktemp("whole")
            found[name] = step(
                folder, str(policy_folder), name, per_device_train_batch_size=EPISODES
            )
        return found[name]

    return whole


def assert_same(found: Parts, expected: Parts) -> None:
    assert found.keys() == expected.keys()
    for part, moved in expected.items():
        assert moved.abs().max() > 1e-4
        assert ((found[part] - moved).norm() / moved.norm()).item() < 1e-5, part


@pytest.mark.parametrize("name", WAYS)
def test_accumulation_and_the_order_of_micro_batches_leave_the_gradient_unchanged(
    tmp_path: Path, policy_folder: Path, whole: Callable[[str], Parts], name: str
) -> None:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": EPISODES // 2}
    assert_same(step(tmp_path, str(policy_folder), name, reverse=True, **settings), whole(name))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_processes_take_the_step_of_one(
    tmp_path: Path, policy_folder: Path, whole: Callable[[str], Parts]
) -> None:
    worker = str(ROOT / "tests" / "gradient_worker.py")
    command = [*launcher("cpu_ddp"), worker, str(policy_folder), str(tmp_path)]
    with job(command, tmp_path / "log") as launch:
        assert launch.wait(240) == 0, launch.output[-6000:]
    for name, found in torch.load(tmp_path / "gradients.pt").items():
        assert_same(found, whole(name))
