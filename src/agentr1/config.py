"""The settings of training, and every check that needs only configuration.

`AgentConfig`, read by `TrlParser`, extends TRL's `GRPOConfig` by what the rollout needs, and by
what credit needs (`credit_config.py`). Nothing in this module loads a model or opens a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from typing import Any

from trl import GRPOConfig

from agentr1.algorithms import algorithm as find_algorithm
from agentr1.credit_config import OF_THE_CRITIC, CreditConfig
from agentr1.guard_config import check_guard
from agentr1.rollout import Limits

TRLS_SAMPLING_MODE = "sequence_mask"
"""TRL's default way to bring engine and trainer together."""

_FROM_SCALAR_SIGN = ("vespo", "luspo")
"""Losses whose meaning changes when an advantage varies within a sequence."""


@dataclass
class AgentConfig(CreditConfig, GRPOConfig):
    """TRL's `GRPOConfig` with the settings of multi-turn rollouts and turn-level credit."""

    algorithm: str | None = field(
        default=None,
        metadata={
            "help": "Row of `agentr1.algorithms.ALGORITHMS`. It fixes the TRL fields that define "
            "it; unset leaves TRL's own fields alone."
        },
    )
    max_turns: int = field(default=8, metadata={"help": "Model calls of one episode at most."})
    max_turn_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Sampled tokens of one turn at most; unset leaves it to "
            "`max_completion_length`, the budget of the whole episode, observations included."
        },
    )
    max_observation_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of all observations of an episode together; one that does not fit ends "
            "the episode unseen. Unset leaves it to `max_completion_length`."
        },
    )
    max_episode_seconds: float | None = field(
        default=None, metadata={"help": "Wall-clock limit of one episode."}
    )
    max_slots: int = field(
        default=256, metadata={"help": "Episodes decoded at once in this process; more wait."}
    )
    spare_rollouts: int = field(
        default=0,
        metadata={
            "help": "Episodes started per group beyond num_generations; when that many have ended, "
            "the group's stragglers are cut. For tools with a heavy tail: leans towards episodes "
            "that end early."
        },
    )
    max_fault_share: float = field(
        default=0.5,
        metadata={
            "help": "Stop the run when a larger share of a batch's or a test's turns met a fault "
            "of the infrastructure (a tool server down, say)."
        },
    )
    trajectory_steps: int = field(
        default=10,
        metadata={"help": "Write the trajectories of every so many steps; 0 writes none."},
    )

    def __post_init__(self) -> None:
        if self.algorithm is not None:
            self._apply_algorithm(self.algorithm)
        with self._one_rollout_a_prompt():
            super().__post_init__()
        self._check_ranges()
        self.check_credit()
        self._check_idle()

    def _apply_algorithm(self, name: str) -> None:
        """Set what the algorithm fixes; a different value set by hand is an error, not a guess.

        What it only proposes is set where the field is at its default. A value set by hand that
        equals the default cannot be told from one left alone: `keep_given` sees to recipes.
        """
        row = find_algorithm(name)
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        for key, value in row.settings.items():
            current = getattr(self, key)
            if current not in (value, defaults.get(key)):
                raise ValueError(
                    f"algorithm {name!r} fixes {key}={value!r}, but it is set to {current!r}; "
                    f"remove {key}, or leave `algorithm` out and set TRL's fields yourself"
                )
            setattr(self, key, value)
        for key, value in row.defaults.items():
            if getattr(self, key) == defaults.get(key):
                setattr(self, key, value)

    def keep_given(self, given: Mapping[str, Any]) -> None:
        """Hold to what a recipe or a command says in so many words, defaults included.

        Args:
            given: name to value, as read or as text.

        Raises:
            ValueError: it contradicts what the algorithm fixes.
        """
        if self.algorithm is None:
            return
        row, defaults = find_algorithm(self.algorithm), {f.name: f.default for f in fields(self)}
        for key, value in row.settings.items():
            if key in given and not _same(given[key], value):
                raise ValueError(
                    f"algorithm {self.algorithm!r} fixes {key}={value!r}, but it is set to "
                    f"{given[key]!r}; remove {key}, or leave `algorithm` out and set TRL's fields"
                )
        for key in row.defaults:
            if key in given and _same(given[key], defaults[key]):
                setattr(self, key, defaults[key])

    def _check_idle(self) -> None:
        """Refuse settings of a critic, or of one algorithm, where they would do nothing."""
        if self.anchor_weight != 1 and self.algorithm != "gigpo":
            raise ValueError(
                f"anchor_weight={self.anchor_weight} is a setting of gigpo, got algorithm "
                f"{self.algorithm!r}; remove it"
            )
        if self.algorithm is not None and find_algorithm(self.algorithm).needs_critic:
            if self.critic_warmup_steps and self.weight_decay:
                raise ValueError(
                    f"critic_warmup_steps={self.critic_warmup_steps} leaves the policy as it is, "
                    f"but weight_decay={self.weight_decay} would shrink it; set one of them to 0"
                )
            return
        defaults = {f.name: f.default for f in fields(self)}
        if idle := [name for name in OF_THE_CRITIC if getattr(self, name) != defaults[name]]:
            raise ValueError(
                f"{idle[0]}={getattr(self, idle[0])!r} is a setting of a critic, which algorithm "
                f"{self.algorithm!r} has not; remove it, or use algorithm: ppo"
            )

    @contextmanager
    def _one_rollout_a_prompt(self) -> Iterator[None]:
        """Let `num_generations: 1` pass where an algorithm compares no rollouts of one prompt.

        `GRPOConfig` refuses it for GRPO's sake; its trainer runs with it.
        """
        wanted = self.num_generations
        alone = wanted == 1 and self.algorithm is not None
        if alone and find_algorithm(str(self.algorithm)).needs_group:
            raise ValueError(
                f"algorithm {self.algorithm!r} compares the rollouts of a prompt, got "
                "num_generations=1; set 2 or more, or use reinforce++ or ppo"
            )
        if alone and self.refill_rounds:
            raise ValueError(
                f"refill_rounds={self.refill_rounds} replaces groups whose rollouts were paid "
                "alike, and a group of one always is; set it to 0, or num_generations to 2 or more"
            )
        if alone:  # what divides the batch of a process divides that of all
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            mine = self.generation_batch_size or self.per_device_train_batch_size * steps
            self.num_generations = max(2, mine)
            self.num_generations_eval = 1
        try:
            yield
        finally:
            self.num_generations = wanted

    def _check_ranges(self) -> None:
        checks = [
            ("max_turns", _counts(self.max_turns), "a whole number, at least 1"),
            (
                "max_turn_tokens",
                self.max_turn_tokens is None or _counts(self.max_turn_tokens),
                "a whole number, at least 1, or unset",
            ),
            (
                "max_observation_tokens",
                self.max_observation_tokens is None or _counts(self.max_observation_tokens),
                "a whole number, at least 1, or unset",
            ),
            (
                "max_episode_seconds",
                self.max_episode_seconds is None or self.max_episode_seconds > 0,
                "more than 0, or unset",
            ),
            ("max_slots", _counts(self.max_slots), "a whole number, at least 1"),
            ("spare_rollouts", _counts(self.spare_rollouts + 1), "a whole number, 0 or more"),
            ("max_fault_share", 0.0 <= self.max_fault_share <= 1.0, "in [0, 1]"),
            ("trajectory_steps", self.trajectory_steps >= 0, "0 or more"),
        ]
        for name, holds, expected in checks:
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def limits(self) -> Limits:
        """What truncates an episode, in training and evaluation alike."""
        assert self.max_completion_length is not None  # check_for_environment has seen to it
        return Limits(
            max_turns=self.max_turns,
            max_completion_length=self.max_completion_length,
            max_turn_tokens=self.max_turn_tokens,
            max_observation_tokens=self.max_observation_tokens,
            max_seconds=self.max_episode_seconds,
        )

    @property
    def sampling_mode(self) -> str | None:
        """TRL's `vllm_importance_sampling_mode` for the engine at hand, None for no correction."""
        if self.sampling_correction != "auto":
            return None if self.sampling_correction == "off" else self.sampling_correction
        differs = self.use_vllm or self.bf16 or self.fp16
        return "token_truncate" if differs and self.vllm_importance_sampling_correction else None

    def check_for_environment(self) -> None:
        """Refuse settings that cannot be right once an environment is in play.

        Raises:
            ValueError: with the setting, its value and the way out.
        """
        if self.top_p != 1.0 or self.top_k not in (0, None) or self.min_p is not None:
            raise ValueError(
                "the policy is trained on the distribution it is sampled from, so top_p must be 1, "
                f"top_k 0 and min_p unset, got top_p={self.top_p}, top_k={self.top_k}, "
                f"min_p={self.min_p}; shape exploration with `temperature`"
            )
        if self.repetition_penalty != 1.0 or self.generation_kwargs:
            raise ValueError(
                "with an environment, temperature is the only setting of sampling; got "
                f"repetition_penalty={self.repetition_penalty}, generation_kwargs="
                f"{self.generation_kwargs}; unset both"
            )
        if self.use_transformers_continuous_batching:
            raise ValueError(
                "with an environment, agentr1's own engines sample; got "
                "use_transformers_continuous_batching=True; unset it, or set use_vllm for a server"
            )
        if self.max_completion_length is None:
            raise ValueError(
                "max_completion_length is unset, but with an environment it is the token budget of "
                "an episode; set a number that fits the model's context, 1024 for example"
            )
        self._check_sampling()
        check_guard(self)
        self._check_vllm()
        self._check_processes()

    def check_rows(self, rows: int) -> None:
        """Refuse a train set that gives no batch: the Trainer would end without a step.

        Raises:
            ValueError: with both numbers and the way out.
        """
        assert self.generation_batch_size and self.num_generations  # GRPOConfig has set them
        wanted = self.generation_batch_size // self.num_generations
        if rows < wanted:
            raise ValueError(
                f"the train set has {rows} rows, and one batch of rollouts takes {wanted} "
                f"(generation_batch_size {self.generation_batch_size} / num_generations "
                f"{self.num_generations}); give more rows, or lower steps_per_generation or "
                "per_device_train_batch_size"
            )

    def _check_sampling(self) -> None:
        """Refuse what leaves tokens trained otherwise than they were sampled."""
        if self.vllm_importance_sampling_mode != TRLS_SAMPLING_MODE:
            raise ValueError(
                "with an environment, sampling_correction says how engine and trainer are brought "
                f"together, got vllm_importance_sampling_mode={self.vllm_importance_sampling_mode};"
                f" set sampling_correction: {self.vllm_importance_sampling_mode} instead"
            )
        if self.loss_mask == "all" and self.sampling_mode:
            raise ValueError(
                "loss_mask: all trains on observations, which no engine has sampled, so their "
                "probabilities cannot be corrected; set sampling_correction: 'off'"
            )
        if self.algorithm and find_algorithm(self.algorithm).greedy_first and self.spare_rollouts:
            raise ValueError(
                f"algorithm {self.algorithm!r} needs the greedy episode of each group, which "
                f"spare_rollouts={self.spare_rollouts} may cut as a straggler; set it to 0"
            )

    @property
    def vllm_urls(self) -> list[str]:
        """Addresses of the vLLM servers, from TRL's fields."""
        named = (
            self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"
        )
        return [url.strip().rstrip("/") for url in named.split(",") if url.strip()]

    def _check_vllm(self) -> None:
        """Refuse what TRL would have, and what our engine does not do."""
        if not self.use_vllm:
            return
        ignored = {
            "vllm_structured_outputs_regex": self.vllm_structured_outputs_regex is not None,
            "vllm_tensor_parallel_size": self.vllm_tensor_parallel_size != 1,
            "vllm_enable_sleep_mode": self.vllm_enable_sleep_mode,
            "vllm_model_impl": self.vllm_model_impl != "vllm",
        }
        if any(ignored.values()):
            name = next(name for name, is_set in ignored.items() if is_set)
            raise ValueError(
                f"rollouts on vLLM do not use {name}, got {getattr(self, name)!r}; unset it (to "
                "spread a model over several GPUs, start a server with --tensor-parallel-size)"
            )
        if self.vllm_mode == "colocate" and find_spec("vllm") is None:
            raise ValueError(
                "vllm_mode is 'colocate', TRL's default, but vLLM is not installed here; "
                "docs/vllm.md says how to, or set vllm_mode: server with vllm_server_base_url"
            )
        if wrong := [u for u in self.vllm_urls if not u.startswith(("http://", "https://"))]:
            raise ValueError(
                f"vllm_server_base_url must name addresses like http://localhost:8000, got {wrong}"
            )
        if (
            self.loss_type == "vespo"
            and self.sampling_mode is not None
            and not self.sampling_mode.startswith("token")
        ):
            raise ValueError(
                "loss_type vespo needs sampling_correction token_truncate or token_mask, got "
                f"{self.sampling_mode!r}"
            )

    def _check_processes(self) -> None:
        """Refuse what would make the processes of a run wait for each other, or mix groups."""
        fsdp = self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if fsdp or not self.ds3_gather_for_generation:
            raise ValueError(
                "episodes take different numbers of turns on each process, so no forward pass of a "
                f"rollout may wait for another process; got fsdp={bool(fsdp)}, "
                f"ds3_gather_for_generation={self.ds3_gather_for_generation}; use DDP or DeepSpeed "
                "ZeRO (recipes/accelerate) and leave ds3_gather_for_generation true"
            )
        local_batch = self.per_device_train_batch_size * (self.steps_per_generation or 1)
        if local_batch % (self.num_generations or 1):
            raise ValueError(
                f"a group of {self.num_generations} rollouts must not span processes, but each "
                f"process generates per_device_train_batch_size x steps_per_generation = "
                f"{self.per_device_train_batch_size} x {self.steps_per_generation} = {local_batch} "
                "rollouts; make that a multiple of num_generations"
            )

    def check_for_turn_advantages(self) -> None:
        """Refuse losses that read one advantage per sequence; needed where turns are paid.

        Raises:
            ValueError: with the setting, its value and the way out.
        """
        if self.loss_type in _FROM_SCALAR_SIGN or self.off_policy_mask_threshold is not None:
            raise ValueError(
                f"process rewards give each turn its own advantage, but loss_type="
                f"{self.loss_type!r} with off_policy_mask_threshold="
                f"{self.off_policy_mask_threshold} reads one per sequence; use grpo, dapo, bnpo, "
                "dr_grpo, cispo or sapo without the threshold, or drop the process rewards"
            )


def _same(given: Any, value: Any) -> bool:
    """True where a value as read from YAML or typed on the command line is that value."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(given) == value
        except (TypeError, ValueError):
            return False
    return str(given).lower() == str(value).lower()


def _counts(value: object) -> bool:
    return isinstance(value, int) and value >= 1
