"""Run by tests/test_vllm_server.py in vLLM's environment: the colocated engine, for real.

Prints one line of JSON per process. Two processes take different numbers of steps.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from agentr1.engines.base import Generation, Sampling
from agentr1.engines.colocated import ColocatedEngine
from agentr1.engines.vllm_sync import save_adapter, teacher_forced

STOP = 2


def main(policy: Path, rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()
    before = torch.get_rng_state()
    engine = ColocatedEngine(model, [STOP], dtype="float32", max_model_len=512)
    found: dict[str, Any] = {"random_state_kept": bool((torch.get_rng_state() == before).all())}
    requests = [
        ([5, 6, 7 + i], Sampling(20 + 30 * rank, temperature, seed=i))
        for i, temperature in enumerate([0.0, 0.5, 1.0, 1.5] * 3)
    ]

    async def play() -> list[Generation]:
        return await asyncio.gather(*(engine.generate(*request) for request in requests))

    errors, reasons = [], set()
    for _ in range(3):
        engine.sync(model)
        for (prompt, sampling), answer in zip(requests, asyncio.run(play()), strict=True):
            reasons.add(answer.finish_reason)
            ours = teacher_forced(model, prompt, answer.ids, sampling.temperature)
            errors += [abs(a - b) for a, b in zip(answer.logprobs, ours, strict=True)]
        move(model)
    engine.sync(model)
    found |= {"error": max(errors), "reasons": sorted(reasons)}
    found["repeats"] = asyncio.run(play()) == asyncio.run(play())
    found["cancelled"] = asyncio.run(cancel(engine))
    found["base_caught"] = base_is_caught(engine, model)
    engine.close()
    return found


@torch.no_grad()
def move(model: Any) -> None:
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight += 0.02 * torch.randn_like(weight)


async def cancel(engine: ColocatedEngine) -> bool:
    """A cancelled action frees its place: a sync is accepted and others are answered."""
    task = asyncio.create_task(engine.generate([5, 6, 7], Sampling(400)))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await engine.generate([5, 6, 7], Sampling(4))
    return task.cancelled()


def base_is_caught(engine: ColocatedEngine, model: Any) -> str:
    """What the engine says when the files it reads are an adapter that does nothing."""
    moved = {n: w.clone() for n, w in model.named_parameters() if "lora_B" in n}

    def save_nothing(served: Any, name: str, folder: Path) -> None:
        with torch.no_grad():
            for key, weight in model.named_parameters():
                weight.mul_(0.0 if key in moved else 1.0)
            save_adapter(served, name, folder)
            for key, weight in model.named_parameters():
                weight.copy_(moved.get(key, weight))

    from agentr1.engines import colocated

    colocated.save_adapter = save_nothing
    try:
        engine.sync(model)
    except RuntimeError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    rank = 0
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
    print(json.dumps(main(Path(sys.argv[1]), rank)), flush=True)
