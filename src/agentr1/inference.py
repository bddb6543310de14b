"""Which engine samples a run's episodes, by the fields TRL has for it.

Layer 6, called by the trainer. The one place that knows all engines; they know no configuration.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from agentr1.config import AgentConfig
from agentr1.engines.base import Engine
from agentr1.engines.colocated import ColocatedEngine
from agentr1.engines.in_process import InProcessEngine
from agentr1.engines.vllm import VllmEngine


def make_engine(
    config: AgentConfig, model: Any, stop_ids: Sequence[int], accelerator: Accelerator
) -> Engine:
    """The engine a configuration asks for; called on every process.

    Args:
        config: `use_vllm` and TRL's `vllm_*` fields; without it, the model itself samples.
        model: that is trained, unwrapped.
        stop_ids: ids that end an action.
        accelerator: of the run.

    Raises:
        ValueError: vLLM cannot take this policy's weights.
    """
    if not config.use_vllm:
        return InProcessEngine(model, stop_ids, config.max_slots)
    if config.vllm_mode == "colocate":
        mixed = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision)
        return ColocatedEngine(
            model,
            stop_ids,
            dtype=mixed or str(model.dtype).removeprefix("torch."),
            max_model_len=config.vllm_max_model_length,
            memory=config.vllm_gpu_memory_utilization,
        )
    name: list[Any] = [f"agentr1-{secrets.token_hex(4)}"]
    broadcast_object_list(name)  # the first process's
    return VllmEngine(
        config.vllm_urls,
        stop_ids=stop_ids,
        vocab_size=model.config.get_text_config().vocab_size,
        name=name[0],
        adapters=Path(str(config.output_dir)) / "adapters",
        rank=accelerator.process_index,
        timeout=config.vllm_server_timeout,
        group_port=config.vllm_group_port,
    )


@contextmanager
def without_trls_engine(config: AgentConfig) -> Iterator[None]:
    """Hide `use_vllm` from TRL's constructor, whose own engine waits for all ranks each turn."""
    chosen, config.use_vllm = config.use_vllm, False
    try:
        yield
    finally:
        config.use_vllm = chosen
