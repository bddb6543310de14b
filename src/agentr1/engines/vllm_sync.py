"""How the trained weights get to vLLM servers, and how one sees that they are the ones served.

A LoRA adapter travels as files in a folder that the servers read; whole weights through TRL's
NCCL transport. Called by `vllm` on rank 0, with whole parameters; knows models, nothing of
requests.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from trl.generation.vllm_client import VLLMClient

from agentr1.engines.base import Generation, Sampling

PROBE = Sampling(max_tokens=16, temperature=0.5, seed=1)
"""Any temperature but 1 tells processed logprobs from raw ones."""
SEPARABLE = 4.0
"""An adapter is told from its base where it moves the probe by so many times the rounding."""
LEAST_ROUNDING = 1e-5
"""Mean logprob difference of fp32, whatever one probe shows."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base weights, which the server has as they were."""


def lora_adapter(model: PeftModel) -> str:
    """The name of the adapter that is trained, which must be one that vLLM can load.

    Raises:
        ValueError: it has parts that vLLM does not read or reads otherwise; all are named.
    """
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"vLLM serves one adapter, but {model.active_adapters} are active; activate one"
        )
    (name,) = model.active_adapters
    config = model.peft_config[name]
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"vLLM loads LoRA adapters, got {type(config).__name__}; train LoRA, or sample in "
            "process (use_vllm: false)"
        )
    targets = config.target_modules or ()
    targets = [targets] if isinstance(targets, str) else sorted(targets)
    initial = str(config.init_lora_weights).lower()
    unread = {
        "use_dora": (config.use_dora, "vLLM has no place for magnitudes"),
        "bias": (config.bias != "none" or config.lora_bias, "vLLM reads no trained bias"),
        "modules_to_save": (config.modules_to_save, "vLLM would serve the base's copy"),
        "trainable_token_indices": (config.trainable_token_indices, "vLLM reads no embeddings"),
        "target_parameters": (config.target_parameters, "vLLM may misread their layout"),
        "rank_pattern": (config.rank_pattern, "vLLM scales every layer by one rank"),
        "alpha_pattern": (config.alpha_pattern, "vLLM scales every layer by one alpha"),
        "init_lora_weights": (initial.startswith(_CHANGES_BASE), "it changes the base weights"),
        "target_modules": (
            any("lm_head" in t or "embed_tokens" in t for t in targets),
            "vLLM restricts LoRA on the head and on embeddings",
        ),
    }
    reasons = [
        f"{key}={getattr(config, key)!r}: {why}" for key, (set_, why) in unread.items() if set_
    ]
    if reasons:
        raise ValueError(
            f"vLLM cannot load this adapter as it is trained ({'; '.join(reasons)}); unset these, "
            "or sample in process (use_vllm: false)"
        )
    return name


def save_adapter(model: PeftModel, adapter: str, folder: Path) -> None:
    """Write the adapter so that `folder` is complete from the moment it exists."""
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    # No embeddings: looking whether the base's have changed would ask the Hub.
    model.save_pretrained(str(aside), selected_adapters=[adapter], save_embedding_layers=False)
    saved = aside if adapter == "default" else aside / adapter
    saved.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


class WeightStream:
    """Whole weights over NCCL, by TRL's client. Not measured: it needs two GPUs.

    Args:
        urls: servers started with `--weight-transfer-config '{"backend": "nccl"}'` and
            `VLLM_SERVER_DEV_MODE=1`.
        group_port: of the first server's group; each further one takes the next.
        timeout: seconds a server may take to come up.
        device: where the weights are.

    Raises:
        ValueError: the weights are not on a CUDA device.
    """

    def __init__(
        self, urls: Sequence[str], group_port: int, timeout: float, device: torch.device
    ) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"whole weights travel to vLLM over NCCL, which needs CUDA, but the model is on "
                f"{device.type!r}; train an adapter (use_peft: true), which travels as files, or "
                "sample in process (use_vllm: false)"
            )
        self._clients = [
            VLLMClient(base_url=url, group_port=group_port + i, connection_timeout=timeout)
            for i, url in enumerate(urls)
        ]
        for client in self._clients:
            client.init_communicator(device=device)

    def send(self, model: Any) -> None:
        """Replace every server's weights and drop what it cached under the old ones."""
        for client in self._clients:
            client.update_model_params(model)
            client.reset_prefix_cache()

    def close(self) -> None:
        """Leave the groups."""
        for client in self._clients:
            client.close_communicator()


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """What one server answered to the probe.

    Attributes:
        where: for messages, "the vLLM server at http://host:8000".
        policy: sampled under the name of the policy that was just synced.
        base: sampled under the base model's, to measure the rounding between server and model;
            None where the policy has no base of its own.
    """

    where: str
    policy: Generation
    base: Generation | None


def check_served(model: Any, prompt_ids: Sequence[int], served: Served, tolerance: float) -> None:
    """Compare what a server gave the probe with what the model gives the same tokens.

    Raises:
        RuntimeError: the server serves something else than what is trained.
    """
    if served.base is not None:
        with model.disable_adapter():
            noise = _agree(
                model, prompt_ids, served.base, tolerance, f"{served.where} (base model)"
            )
            base = teacher_forced(model, prompt_ids, served.policy.ids, PROBE.temperature)
        trained = teacher_forced(model, prompt_ids, served.policy.ids, PROBE.temperature)
        rounding = SEPARABLE * max(noise, LEAST_ROUNDING)
        to_base, error = (_distance(served.policy.logprobs, own) for own in (base, trained))
        if _distance(trained, base) > rounding and to_base <= error:
            instead = "its base model" if to_base <= rounding else "another one"
            raise RuntimeError(
                f"{served.where} took the new adapter but serves {instead}: the "
                f"probe's logprobs are {to_base:.2g} from the base's and {error:.2g} from the "
                "trained adapter's. Restart the server; with data-parallel replicas behind one "
                "address, give each replica an address of its own"
            )
    _agree(model, prompt_ids, served.policy, tolerance, served.where)


def teacher_forced(
    model: Any, prompt_ids: Sequence[int], ids: Sequence[int], temperature: float
) -> tuple[float, ...]:
    """Logprobs of softmax(logits / temperature) that the model gives to `ids`."""
    tokens = torch.tensor([[*prompt_ids, *ids]], device=model.device)  # (1, L)
    with torch.no_grad():
        logits = model(input_ids=tokens, logits_to_keep=len(ids) + 1).logits[0, :-1]  # (T, V)
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    chosen = torch.tensor(list(ids), device=logprobs.device)[:, None]
    return tuple(cast(list[float], logprobs.gather(-1, chosen)[:, 0].tolist()))


def _agree(
    model: Any, prompt_ids: Sequence[int], answer: Generation, tolerance: float, where: str
) -> float:
    """The distance between server and model, which must be rounding."""
    distance = _distance(
        answer.logprobs, teacher_forced(model, prompt_ids, answer.ids, PROBE.temperature)
    )
    if distance <= tolerance:
        return distance
    raw = _distance(answer.logprobs, teacher_forced(model, prompt_ids, answer.ids, 1.0))
    if raw <= tolerance:
        raise RuntimeError(
            f"{where} reports logprobs before temperature, but the policy is "
            "trained on the distribution it is sampled from; start it with --logprobs-mode "
            "processed_logprobs"
        )
    raise RuntimeError(
        f"{where} does not serve what is trained: its logprobs of a probe "
        f"differ by {distance:.3g} on average, more than {tolerance} that would be rounding. "
        "Start it with the very model that is trained, the same dtype and --logprobs-mode "
        "processed_logprobs"
    )


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)
