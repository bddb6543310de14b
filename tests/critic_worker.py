"""One process of a launch that trains a critic beside a policy; see test_critic_ranks.py.

    accelerate launch --config_file FILE tests/critic_worker.py POLICY OUT KIND [CHECKPOINT]

KIND is a critic's; with `adapter` the policy is one too, under gradient checkpointing, and with
`adapter_bf16` all of that is bf16. The ranks' episodes differ in length. From CHECKPOINT the run
goes on. Numbers go to OUT/rank0.json and OUT/rank1.json.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback, training_args

from agentr1.actor_critic import ActorCriticTrainer
from agentr1.launch import launch_overrides, prepare_process
from ranks_worker import ROWS
from trainers import make_trainer, planned

PLANS = (
    ([1.0, 0.0, 2.0], [0.5], [0.0, None], [0.0, 1.0, 0.0, 0.0]),
    ([0.0], [1.0], [0.5], [0.0]),
)
STEPS = 4
PARTS = {"head": "value_head", "adapter": "value_adapter", "trunk": "value_trunk"}
"""Of a critic, by a word in their parameters' names; all else is the policy's."""


def part_of(name: str) -> str:
    return next((part for part, word in PARTS.items() if word in name), "policy")


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """What is trained, by part, gathered where ZeRO-3 has split it."""
    named = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]

    def copied() -> dict[str, torch.Tensor]:
        found: dict[str, list[torch.Tensor]] = {}
        for name, p in named:
            found.setdefault(part_of(name), []).append(p.detach().float().flatten().clone())
        return {part: torch.cat(tensors) for part, tensors in found.items()}

    if hasattr(parameters[0], "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return copied()
    return copied()


class Weights(TrainerCallback):
    """After every step: how far apart the ranks' weights are, and how far each part has moved."""

    def __init__(self, trainer: Any, found: dict[str, Any]) -> None:
        self.trainer, self.found = trainer, found

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.before = whole_weights(self.trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = whole_weights(self.trainer)
        for part, weights in now.items():
            everyone = self.trainer.accelerator.gather(weights[None])
            assert len(everyone) == 2
            apart = (everyone[0] - everyone[1]).abs().max().item()
            self.found["apart"].setdefault(part, []).append(apart)
            moved = (weights - self.before[part]).abs().max().item()
            self.found["moved"].setdefault(part, []).append(moved)
        self.before = now


def main(policy: str, out: Path, kind: str, checkpoint: str | None = None) -> None:
    faulthandler.dump_traceback_later(80)  # a launch that hangs says where
    prepare_process()
    words = launch_overrides()
    launch = dict(zip((w.removeprefix("--") for w in words[::2]), words[1::2], strict=True))
    launch = {k: v == "true" if v in ("true", "false") else v for k, v in launch.items()}
    rank = int(os.environ["RANK"])
    kind, _, precision = kind.partition("_")
    lora = kind == "adapter"
    if precision:
        # DeepSpeed's processes are not told `use_cpu`, so transformers asks for a GPU that can do
        # bf16. These cores can, slowly.
        training_args.is_torch_bf16_gpu_available = lambda: True
        launch |= {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = make_trainer(
        out,
        policy,
        AutoTokenizer.from_pretrained(policy),
        trainer=ActorCriticTrainer,
        rows=ROWS,
        settings={
            "algorithm": "ppo",
            "critic": kind,
            "max_steps": STEPS,
            "num_iterations": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": lora,
            "critic_learning_rate": 2e-2,
            "reward_kl": 0.05,
            "save_strategy": "steps",
            "save_steps": STEPS // 2,
            "max_fault_share": 1.0,
            **launch,
        },
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if lora else None,
        env_factory=planned(*PLANS[rank], ends=lambda i: i != 3 or rank == 1),
    )
    dtypes = {part_of(n): str(p.dtype) for n, p in trainer.model.named_parameters()}
    found: dict[str, Any] = {"apart": {}, "moved": {}, "dtypes": dtypes}
    trainer.add_callback(Weights(trainer, found))
    trainer.train(resume_from_checkpoint=checkpoint)
    found["weights"] = {k: w.tolist() for k, w in whole_weights(trainer).items()}
    found["logged"] = trainer.state.log_history
    trainer.save_model(str(out / "final"))
    (out / f"rank{rank}.json").write_text(json.dumps(found))
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
