"""vLLM inside the training process, on the same device, stepped by the rollout's event loop.

Requests join and leave between two steps, as in `in_process`, and no episode waits for another's
tools. vLLM keeps a copy of the base weights of its own and is given the adapter as files. Called
by the rollout and the trainer; knows ids and weights, nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from agentr1.engines.base import Engine, Generation, Sampling
from agentr1.engines.vllm_sync import PROBE, Served, check_served, lora_adapter, save_adapter

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Adapter ranks that vLLM makes room for."""


class ColocatedEngine(Engine):
    """vLLM's engine in this process. Needs vLLM installed beside the trainer, and an adapter.

    Each process of a run has an engine of its own; none waits for another's between two syncs.

    Args:
        model: to be trained; vLLM loads the base weights that its configuration names.
        stop_ids: ids that end an action.
        dtype: that the policy is trained in, "bfloat16" for example.
        max_model_len: longest prompt plus completion; None takes the model's.
        memory: share of the device's memory that vLLM takes, its weights included.
        tolerance: mean difference of a probe's logprobs between vLLM and trained model that is
            put down to rounding.

    Raises:
        ValueError: the model has no adapter, or none that vLLM can load.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: Sequence[int],
        *,
        dtype: str,
        max_model_len: int | None = None,
        memory: float = 0.3,
        tolerance: float = 0.1,
    ) -> None:
        if not isinstance(model, PeftModel):
            raise ValueError(
                "a colocated vLLM engine takes its weights as an adapter, but the model is a whole "
                f"{type(model).__name__}; train an adapter (use_peft: true), or sample in process "
                "(use_vllm: false)"
            )
        self._stop_ids = sorted(stop_ids)
        self._tolerance = tolerance
        self._version = 0
        self._adapter: Any = None
        self._folder = tempfile.TemporaryDirectory(prefix="agentr1-adapters-")
        self._names = itertools.count()
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._pump: asyncio.Task[None] | None = None
        with _random_state_kept():
            self._engine = _start(model, dtype, max_model_len, memory)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Sample one action; see `Engine.generate`."""
        loop = asyncio.get_running_loop()
        name = self._submit(prompt_ids, sampling, self._stop_ids, self._adapter)
        future = self._waiting[name] = loop.create_future()
        if self._pump is None or self._pump.done():
            self._pump = loop.create_task(self._run())
        try:
            return _generation(await future)
        except asyncio.CancelledError:
            self._engine.abort_request([name])
            raise
        finally:
            self._waiting.pop(name, None)

    def sync(self, model: Any) -> None:
        """Make the weights of `model` live; see `Engine.sync`. It must be in evaluation mode."""
        if self._waiting:
            raise RuntimeError(
                "sync was called while actions were being sampled, which would mix two policies in "
                "one action; wait for the rollout to end"
            )
        self._load_adapter(model)
        served = Served("the colocated vLLM engine", self._probe(self._adapter), self._probe(None))
        check_served(model, self._probe_ids, served, self._tolerance)

    def close(self) -> None:
        """Delete the adapter's files."""
        self._folder.cleanup()

    def _load_adapter(self, model: PeftModel) -> None:
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        name = lora_adapter(model)
        old = self._adapter
        self._version += 1
        # A name of its own for each version: the prefix cache goes by it.
        folder = Path(self._folder.name) / f"v{self._version}"
        save_adapter(model, name, folder)
        self._adapter = LoRARequest(folder.name, self._version, str(folder))
        self._engine.add_lora(self._adapter)
        if old is not None:
            self._engine.remove_lora(old.lora_int_id)

    @property
    def _probe_ids(self) -> list[int]:
        size = self._engine.model_config.get_vocab_size()
        return random.Random(0).choices(range(min(512, size)), k=16)

    def _probe(self, adapter: Any) -> Generation:
        name = self._submit(self._probe_ids, PROBE, [], adapter)
        while True:
            for output in self._engine.step():
                if output.request_id == name:
                    return _generation(output)

    def _submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, stop_ids: list[int], adapter: Any
    ) -> str:
        from vllm.sampling_params import (  # pyright: ignore[reportMissingImports]
            RequestOutputKind,
            SamplingParams,
        )

        name = str(next(self._names))
        parameters = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed % 2**63,
            stop_token_ids=stop_ids,
            ignore_eos=True,  # only our own ids end an action
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt_token_ids": list(prompt_ids)}
        self._engine.add_request(name, prompt, parameters, lora_request=adapter)
        return name

    async def _run(self) -> None:
        """Step while anything is unanswered; between two steps finished tools are seen."""
        try:
            while self._engine.has_unfinished_requests():
                await asyncio.sleep(0)
                for output in self._engine.step():
                    future = self._waiting.get(output.request_id)
                    if future is not None and not future.done():
                        future.set_result(output)
        except Exception as error:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)


def _start(model: PeftModel, dtype: str, max_model_len: int | None, memory: float) -> Any:
    # Not in a process of its own, where it could not be stepped: vLLM has no argument for it.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]

    config: Any = model.peft_config[lora_adapter(model)]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = EngineArgs(
        model=model.config.name_or_path,
        dtype=dtype,
        max_model_len=max_model_len,
        gpu_memory_utilization=memory,
        enforce_eager=model.device.type == "cpu",  # compiling takes longer there than it saves
        logprobs_mode="processed_logprobs",
        generation_config="vllm",  # not the model's own sampling settings
        distributed_executor_backend="external_launcher" if processes > 1 else "uni",
        disable_log_stats=True,
        enable_lora=True,
        max_lora_rank=next((rank for rank in _RANKS if rank >= config.r), config.r),
        max_loras=2,
    )
    return LLMEngine.from_engine_args(arguments)


def _generation(output: Any) -> Generation:
    answer = output.outputs[0]
    ids = tuple(answer.token_ids)
    logprobs = tuple(
        place[token].logprob for token, place in zip(ids, answer.logprobs, strict=True)
    )
    return Generation(ids, logprobs, answer.finish_reason)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """VLLM seeds every generator of the process, which are the run's."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(arrays)
