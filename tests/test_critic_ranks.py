"""Policy and critic on two processes: both learn, stay equal, are saved apart and go on alike.

Each configuration is launched once, `critic_worker.py` says what it plays. A launch that hangs is
killed and has failed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from critic_worker import STEPS
from processes import ROOT, job, launcher

LAUNCHES = (
    ("cpu_ddp", "adapter"),
    ("cpu_zero2", "adapter"),
    ("cpu_zero3", "adapter"),
    ("cpu_zero3", "adapter_bf16"),
    ("cpu_ddp", "shared"),
    ("cpu_zero3", "shared"),
    ("cpu_ddp", "separate"),
)
ADAPTERS = ("adapter", "adapter_bf16")
RESUMED = (("cpu_ddp", "adapter"), ("cpu_zero3", "adapter"), ("cpu_zero3", "adapter_bf16"))
WORKER = str(ROOT / "tests" / "critic_worker.py")
LIMIT = 100
"""Seconds a launch may take."""

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(120)]

Played = tuple[Path, list[dict[str, Any]]]
"""The folder of a launch and what its two ranks report."""


@pytest.fixture(scope="module")
def played(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Played]:
    done: dict[tuple[str, ...], Played] = {}

    def play(configuration: str, kind: str, *checkpoint: str) -> Played:
        key = (configuration, kind, *checkpoint)
        if key not in done:
            out = tmp_path_factory.mktemp(configuration)
            words = [WORKER, str(policy_folder), str(out), kind, *checkpoint]
            with job([*launcher(configuration), *words], out / "log") as launch:
                assert launch.wait(LIMIT) == 0, launch.output[-6000:]
            done[key] = (out, [json.loads((out / f"rank{r}.json").read_text()) for r in (0, 1)])
        return done[key]

    return play


@pytest.mark.parametrize(("configuration", "kind"), LAUNCHES)
def test_policy_and_critic_move_and_stay_equal_on_both_ranks(
    played: Callable[..., Played], configuration: str, kind: str
) -> None:
    _, ranks = played(configuration, kind)
    parts = {"policy", "head"} | ({"adapter"} if kind in ADAPTERS else set())
    dtype = "torch.bfloat16" if kind == "adapter_bf16" else "torch.float32"
    for rank in ranks:
        assert set(rank["dtypes"].values()) == {dtype}
        assert rank["moved"].keys() - {"trunk"} == parts
        assert rank["apart"] == {part: [0.0] * STEPS for part in rank["moved"]}
        assert all(min(moved[1:]) > 0 for moved in rank["moved"].values())
        assert min(rank["moved"]["policy"]) > 0


@pytest.mark.parametrize("configuration", ["cpu_zero2", "cpu_zero3"])
def test_every_launcher_trains_the_same(played: Callable[..., Played], configuration: str) -> None:
    (_, plain), (_, split) = played("cpu_ddp", "adapter"), played(configuration, "adapter")
    assert plain[0]["weights"].keys() == split[0]["weights"].keys() == {"policy", "adapter", "head"}
    for part, moved in plain[0]["moved"].items():
        assert split[0]["moved"][part] == pytest.approx(moved, rel=1e-3)


def test_numbers_of_the_critic_are_those_of_both_ranks(played: Callable[..., Played]) -> None:
    _, (first, second) = played("cpu_ddp", "adapter")
    # The returns of the plans' eight episodes, token by token, and the outcomes 0, 1, 2, 0 of each
    # rank; the last episode of rank 0 is cut, its critic expects 0. Every turn has six tokens.
    for rank in (first, second):
        assert rank["logged"][0]["critic/returns"] == pytest.approx(17 / 12)
        assert rank["logged"][0]["critic/values"] == 0.0


@pytest.mark.parametrize(("configuration", "kind"), LAUNCHES)
def test_what_is_saved_is_the_policy_and_a_checkpoint_has_the_critic_beside_it(
    played: Callable[..., Played], configuration: str, kind: str
) -> None:
    out, ranks = played(configuration, kind)
    name = "adapter_model.safetensors" if kind in ADAPTERS else "model.safetensors"
    for folder in (out / "final", out / f"checkpoint-{STEPS}"):
        names = load_file(folder / name)
        assert names
        assert not [n for n in names if "value" in n]
    assert not (out / "final" / "critic").exists()
    saved = load_file(out / f"checkpoint-{STEPS}" / "critic" / "critic.safetensors")
    head = torch.cat([saved[f"value_head.{n}"].flatten() for n in ("weight", "bias")])
    assert head.tolist() == pytest.approx(ranks[0]["weights"]["head"])


@pytest.mark.parametrize(("configuration", "kind"), RESUMED)
def test_a_resumed_launch_equals_the_uninterrupted_one(
    played: Callable[..., Played], configuration: str, kind: str
) -> None:
    out, (whole, _) = played(configuration, kind)
    _, (resumed, _) = played(configuration, kind, str(out / f"checkpoint-{STEPS // 2}"))
    assert resumed["weights"] == whole["weights"]
